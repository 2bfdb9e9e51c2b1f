"""Flax modules shared by the models. Each declares its weights once, with the logical axes of `gptjax.axes`."""
