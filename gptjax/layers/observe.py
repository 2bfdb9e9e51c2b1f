"""Letting a caller look at values inside the model, without a second copy of it."""

from collections.abc import Callable

import flax.linen as nn
import jax

COLLECTION = "activations"


def is_observed(module: nn.Module) -> bool:
    """Whether `apply` was asked for values inside the model."""
    return bool(module.is_mutable_collection(COLLECTION))


def observe(module: nn.Module, name: str, value: jax.Array) -> jax.Array:
    """Returns the value, and records it where `apply` was asked for it by `mutable=[COLLECTION]`; else costs nothing.

    Recorded under the module's own path and `name`.
    """
    module.sow(COLLECTION, name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)
    return value


def observe_made(module: nn.Module, name: str, make: Callable[[], jax.Array]) -> None:
    """As `observe`, for a value that the model itself does not need: made only where it is looked at."""
    if is_observed(module):
        observe(module, name, make())
