"""How much memory a model needs, by formula from its declared shapes; nothing is allocated to find out."""

import dataclasses
import math

import jax

from gptjax.models import registry
from gptjax.models.registry import Model


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on the device."""

    weights: int
    cache: int  # keys and values of all rows, all preallocated
    logits: int  # float32, of all rows

    @property
    def total(self) -> int:
        """All of it. What a step holds in passing comes on top."""
        return self.weights + self.cache + self.logits


def needed(model: Model, *, batch: int, max_length: int) -> Memory:
    """The memory of a model with its state."""
    cache = jax.eval_shape(lambda: registry.create_cache(model, batch=batch, max_length=max_length))
    return Memory(
        weights=tree_bytes(registry.abstract_params(model)),
        cache=tree_bytes(cache),
        logits=4 * batch * model.config.vocab_size,
    )


def tree_bytes(tree: object) -> int:
    """Bytes of all arrays, real or abstract, of a pytree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def readable(count: int) -> str:
    """Bytes in decimal units, as disks and cards are sold."""
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.2f} {units[0]}"
