"""The models, as Flax Linen modules, and the way from a config to one."""

from gptjax.models.params import abstract_params, num_params
from gptjax.models.registry import Model, build

__all__ = ["Model", "abstract_params", "build", "num_params"]
