"""The models, as Flax Linen modules, and the way from a config to one."""

from gptjax.models.registry import Model, abstract_params, build, num_params

__all__ = ["Model", "abstract_params", "build", "num_params"]
