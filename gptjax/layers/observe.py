"""A caller's look at values inside the model, without a second copy of the model."""

from collections.abc import Callable

import flax.linen as nn
import jax

COLLECTION = "activations"


def is_observed(module: nn.Module) -> bool:
    """Whether the caller of `apply` asked for values inside the model."""
    return bool(module.is_mutable_collection(COLLECTION))


def observe(module: nn.Module, name: str, value: jax.Array) -> jax.Array:
    """Returns the value, and records it if `apply` was called with `mutable=[COLLECTION]`; costs nothing otherwise.

    It is recorded as `name` under the module's own path.
    """
    module.sow(COLLECTION, name, value, init_fn=lambda: None, reduce_fn=lambda _, new: new)
    return value


def observe_lazy(module: nn.Module, name: str, make: Callable[[], jax.Array]) -> None:
    """Like `observe`, for a value that the model itself does not need: it is computed only if it is observed."""
    if is_observed(module):
        observe(module, name, make())
