"""The demos without most of their layers: as real to an engine or a server, and a third of the time to compile."""

import dataclasses
from typing import Any

import gptjax
from gptjax.models import registry

LAYERS = 2  # of gpt-oss-tales, one with a window and one without


def shallow(name: str, **options: Any) -> gptjax.LanguageModel:
    """A demo's first layers, in float32. The options are `LanguageModel`'s."""
    whole = gptjax.load(name, dtype="float32")
    fields: dict[str, Any] = {"num_layers": LAYERS}
    if "windows" in {field.name for field in dataclasses.fields(whole.config)}:
        fields["windows"] = whole.config.windows[:LAYERS]
    config = dataclasses.replace(whole.config, **fields)
    left_out = {f"block_{layer}" for layer in range(LAYERS, whole.config.num_layers)}
    return gptjax.LanguageModel(
        registry.build(config, dtype="float32"),
        {part: leaves for part, leaves in whole.params.items() if part not in left_out},
        tokenizer=whole.tokenizer,
        defaults=whole.defaults,
        **{"max_length": 512} | options,
    )
