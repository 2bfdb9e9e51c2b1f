"""Rotary position embedding, and how each kind of scaling changes its frequencies.

Source: Su et al. 2021 (arXiv:2104.09864); YaRN: Peng et al. 2023 (arXiv:2309.00071), openai/gpt-oss
`gpt_oss/torch/model.py`; Llama 3.1: meta-llama/llama-models `models/llama3/model.py`, transformers
`modeling_rope_utils.py`.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config.rope import Factors, Linear, Llama3, Rope, Yarn


def inv_freq(rope: Rope, head_width: int) -> np.ndarray:
    """The angle by which each pair of a head turns per position, [H/2] float64."""
    frequency = rope.theta ** (-2 * np.arange(head_width // 2) / head_width)
    match rope.scaling:
        case None:
            return frequency
        case Linear(factor):
            return frequency / factor
        case Factors(divisors):
            return frequency / np.array(divisors)
        case Llama3() as llama3:
            return _llama3(llama3, frequency)
        case Yarn() as yarn:
            return _yarn(yarn, frequency, rope.theta)


def _llama3(llama3: Llama3, frequency: np.ndarray) -> np.ndarray:
    """Pairs that turn often within the original length keep their frequency, those that turn rarely have it divided,
    and between them the two are mixed in proportion to the turns."""
    turns = llama3.original_length * frequency / (2 * math.pi)
    ramp = np.clip((turns - llama3.low_freq_factor) / (llama3.high_freq_factor - llama3.low_freq_factor), 0, 1)
    return (1 - ramp) * frequency / llama3.factor + ramp * frequency


def _yarn(yarn: Yarn, frequency: np.ndarray, theta: float) -> np.ndarray:
    """Like `_llama3`, but mixed in proportion to the pair's index, that is, to the logarithm of the turns."""
    head_width = 2 * len(frequency)

    def pair_turning(times: float) -> float:
        """The (fractional) index of the pair that turns this many times within the original length."""
        return head_width / 2 * math.log(yarn.original_length / (2 * math.pi * times)) / math.log(theta)

    low, high = pair_turning(yarn.beta_fast), pair_turning(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_width - 1)
    ramp = np.clip((np.arange(len(frequency)) - low) / max(high - low, 1e-3), 0, 1)
    return ramp * frequency / yarn.factor + (1 - ramp) * frequency


def rotation(rope: Rope, head_width: int, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """cos and sin of each position's angles, [B, T, 1, H/2] float32; YaRN's attention factor is in both.

    The angle is a float32 product, as in the code that the models were trained and published with.
    """
    frequency = jnp.asarray(inv_freq(rope, head_width), jnp.float32)
    angle = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency
    return jnp.cos(angle) * rope.attention_factor, jnp.sin(angle) * rope.attention_factor


def rotate(x_BTNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns each head's pairs (i, i + H/2) by their angles, in float32; the result has x's dtype."""
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return turned.astype(x_BTNH.dtype)
