"""GPUs that need not be there: how much memory each has, and how fast a model could decode on it at best."""

import dataclasses
from typing import Any, Final

import jax.numpy as jnp

from gptjax.engine import cost
from gptjax.errors import RequestError
from gptjax.models.registry import Model
from gptjax.support.quoting import quoted


@dataclasses.dataclass(frozen=True)
class Card:
    """What its maker says of a GPU. Programs reach about nine tenths of the speeds."""

    memory: float  # bytes
    bandwidth: float  # bytes a second, between the GPU and its memory
    flops: float  # a second, of dense products in bfloat16 with sums in float32


CARDS: Final = {
    "a100-40gb": Card(40e9, 1.555e12, 312e12),
    "a100-80gb": Card(80e9, 2.039e12, 312e12),
    "h100-80gb": Card(80e9, 3.35e12, 989e12),  # SXM
    "h200-141gb": Card(141e9, 4.8e12, 989e12),
    "b200-180gb": Card(180e9, 7.7e12, 2250e12),
    "l4-24gb": Card(24e9, 0.3e12, 121e12),
    "l40s-48gb": Card(48e9, 0.864e12, 362e12),
    "rtx-4090-24gb": Card(24e9, 1.008e12, 165e12),
    "rtx-5090-32gb": Card(32e9, 1.792e12, 209e12),
}


def card_of(name: str) -> Card:
    """A card by its name. Raises `RequestError`."""
    if name not in CARDS:
        raise RequestError(f"unknown device {quoted(name)}; choose one of {', '.join(CARDS)}")
    return CARDS[name]


def decode_floor(model: Model, card: Card, *, batch: int, length: int) -> dict[str, Any]:
    """What a decode step of `batch` rows reads and computes, each row at `length` positions, and how long it takes at
    least.

    The formulas are those that `gptjax bench` compares its measurements with. On a mesh, the bytes and operations are
    those of each device; what the devices tell each other is not counted.
    """
    rows = model.own.rows_of(batch)
    read = cost.decode_bytes(model, batch=rows, length=length)
    flops = rows * cost.token_flops(model, length=length)
    seconds = read / card.bandwidth
    if jnp.dtype(model.dtype).itemsize == 2:  # slower in float32, by how much depends on the card
        seconds = max(seconds, flops / card.flops)
    return {
        "step_positions": length,
        "step_weights_bytes": cost.weight_bytes_per_step(model, batch=rows),
        "step_cache_bytes": rows * cost.cache_bytes(model, length=length),
        "step_gigaflops": round(flops / 1e9, 3),
        "step_ms_at_least": round(1e3 * seconds, 3),
        "tokens_per_second_at_most": round(batch / seconds),
    }
