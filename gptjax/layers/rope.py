"""Rotary position embedding, with YaRN's stretch.

Source: Su et al. 2021 (arXiv:2104.09864); Peng et al. 2023 (arXiv:2309.00071); openai/gpt-oss `gpt_oss/torch/model.py`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.rope import Rope


def inv_freq(rope: Rope, head_width: int) -> np.ndarray:
    """The angle by which each pair of a head turns per position, [H/2] float64.

    With YaRN, pairs that turn often within the original length keep their frequency, those that turn rarely have it
    divided by the factor, and a ramp mixes the two in between.
    """
    pair = np.arange(head_width // 2)
    frequency = rope.theta ** (-2 * pair / head_width)
    if rope.yarn is None:
        return frequency
    yarn = rope.yarn

    def pair_turning(times: float) -> float:
        """The (fractional) index of the pair that turns this many times within the original length."""
        return head_width / 2 * math.log(yarn.original_length / (2 * math.pi * times)) / math.log(rope.theta)

    low, high = pair_turning(yarn.beta_fast), pair_turning(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_width - 1)
    ramp = np.clip((pair - low) / max(high - low, 1e-3), 0, 1)
    return ramp * frequency / yarn.factor + (1 - ramp) * frequency


def rotation(rope: Rope, head_width: int, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of each position's angles, [B, T, 1, H/2] float32; YaRN's attention factor is in both.

    The angle is a float32 product, as in the code that the models were trained and published with.
    """
    frequency = jnp.asarray(inv_freq(rope, head_width), jnp.float32)
    angle = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency
    factor = 1.0 if rope.yarn is None else rope.yarn.attention_factor
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns each head's pairs (i, i + H/2) by their angles, in float32; the result has x's dtype."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return turned.astype(x_BTNH.dtype)
