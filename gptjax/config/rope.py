"""Rotary positions, as a config describes them. The meaning of each kind is code in `layers.rope`."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from gptjax.config.keys import Keys

_MOST = 1e9  # beyond any meaningful setting


@dataclasses.dataclass(frozen=True)
class Linear:
    """All frequencies divided by one factor: positions are squeezed into the length of the first training."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN's stretch of rotary positions (Peng et al., 2023, arXiv:2309.00071)."""

    factor: float  # how many times longer the context is than in the first training
    original_length: int  # positions in the first training
    beta_fast: float  # frequencies with more turns than this within the original length are kept
    beta_slow: float  # those with fewer turns than this are divided by `factor`
    truncate: bool  # whether the bounds between the two are rounded outwards to whole indices

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by, at every position."""
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class Llama3:
    """The stretch that Llama 3.1 introduced."""

    factor: float  # what low frequencies are divided by
    original_length: int  # positions in the first training
    low_freq_factor: float  # frequencies with fewer turns than this within the original length are low
    high_freq_factor: float  # those with more turns than this are kept


@dataclasses.dataclass(frozen=True)
class Factors:
    """A divisor for each frequency, as GGUF's tensor `rope_freqs` has them."""

    divisors: tuple[float, ...]  # H/2


Scaling = Linear | Yarn | Llama3 | Factors


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding."""

    theta: float  # the base: frequency i is theta^(-2i/H), before scaling
    scaling: Scaling | None = None

    @property
    def attention_factor(self) -> float:
        """What cos and sin are multiplied by, at every position."""
        return self.scaling.attention_factor if isinstance(self.scaling, Yarn) else 1.0


def read_rope(keys: Keys, context_length: int, head_width: int, *, absent: Rope) -> Rope:
    """Reads `rope_parameters`, or the older `rope_scaling` and `rope_theta`.

    Args:
      keys: those of config.json; faults are noted there.
      context_length: the original length if a scaling's own `original_max_position_embeddings` is absent.
      head_width: H.
      absent: what a config without these keys means.
    """
    keys.ignore("initial_context_length")  # OpenAI's own name: transformers does not read it
    theta = keys.positive_float("rope_theta", absent=absent.theta)
    found: dict[str, Rope] = {}
    for name in ("rope_parameters", "rope_scaling"):
        section = keys.section(name)
        if section is None:
            continue
        inner = section.positive_float("rope_theta", absent=theta)
        if keys.has("rope_theta") and inner != theta:
            keys.fault(f"rope_theta is {theta}, but in {name} it is {inner}: they mean the same and must agree")
        kind = section.choice("rope_type", {kind: kind for kind in _READERS}, alias="type", absent="default")
        found[name] = Rope(inner, _READERS[kind](section, context_length) if kind else None)
        keys.take(name, section)
    if len(set(found.values())) > 1:
        keys.fault(f"{' and '.join(found)} differ: they mean the same and must agree")
    if "rope_parameters" in found or not keys.empty("rope_parameters"):
        rope = next(iter(found.values()), dataclasses.replace(absent, theta=theta))
    else:  # transformers takes an empty one for rotation without scaling
        rope = Rope(theta)
    check_rope(rope, head_width, keys)
    return rope


def check_rope(rope: Rope, head_width: int, keys: Keys) -> None:
    """Notes a fault for each value that no rotation of heads of this width can have."""
    if not 1 < rope.theta <= _MOST:
        keys.fault(f"rope_theta is {rope.theta}; expected more than 1, and at most {_MOST}")
    scaling = rope.scaling
    if isinstance(scaling, Linear | Yarn | Llama3) and not 1 <= scaling.factor <= _MOST:
        keys.fault(
            f"the rotary factor is {scaling.factor}; expected 1 to {_MOST}: it says how far positions are stretched"
        )
    if isinstance(scaling, Yarn) and not 1 / _MOST <= scaling.beta_slow <= scaling.beta_fast <= _MOST:
        keys.fault(
            f"YaRN's beta_fast is {scaling.beta_fast} and beta_slow {scaling.beta_slow}; expected beta_fast to be at "
            f"least beta_slow, and both from {1 / _MOST} to {_MOST}"
        )
    if isinstance(scaling, Llama3) and not 1 / _MOST <= scaling.low_freq_factor < scaling.high_freq_factor <= _MOST:
        keys.fault(
            f"low_freq_factor is {scaling.low_freq_factor} and high_freq_factor {scaling.high_freq_factor}; expected "
            f"the high one to be larger, and both from {1 / _MOST} to {_MOST}"
        )
    if isinstance(scaling, Factors):
        if len(scaling.divisors) != head_width // 2:
            keys.fault(
                f"there are {len(scaling.divisors)} rotary factors; expected {head_width // 2}, one for each pair of "
                "a head"
            )
        if not all(1 / _MOST <= divisor <= _MOST for divisor in scaling.divisors):
            keys.fault(f"the rotary factors have values that are not from {1 / _MOST} to {_MOST}")


def _linear(section: Keys, context_length: int) -> Linear:
    return Linear(section.positive_float("factor", absent=None))


def _yarn(section: Keys, context_length: int) -> Yarn:
    yarn = Yarn(
        factor=section.positive_float("factor", absent=None),
        original_length=section.size("original_max_position_embeddings", absent=context_length),
        beta_fast=section.positive_float("beta_fast", absent=32.0),
        beta_slow=section.positive_float("beta_slow", absent=1.0),
        truncate=section.flag("truncate", absent=True),
    )
    given = section.positive_float("attention_factor", absent=yarn.attention_factor)
    if not math.isclose(given, yarn.attention_factor, rel_tol=1e-6):
        section.fault(f"attention_factor is {given}; gptjax supports only what factor implies: {yarn.attention_factor}")
    return yarn


def _llama3(section: Keys, context_length: int) -> Llama3:
    return Llama3(
        factor=section.positive_float("factor", absent=None),
        original_length=section.size("original_max_position_embeddings", absent=context_length),
        low_freq_factor=section.positive_float("low_freq_factor", absent=None),
        high_freq_factor=section.positive_float("high_freq_factor", absent=None),
    )


def _factors(section: Keys, context_length: int) -> Factors:
    """LongRoPE, if its factors are the same for short and long texts: then nothing depends on a text's length."""
    section.ignore("factor", "original_max_position_embeddings")  # without effect if attention_factor is given
    short, long = section.numbers("short_factor"), section.numbers("long_factor")
    if short != long:
        section.fault(
            "short_factor and long_factor differ; gptjax supports longrope only if they are equal, since it rotates "
            "texts of all lengths alike"
        )
    if (given := section.positive_float("attention_factor", absent=None)) != 1:
        section.fault(f"attention_factor is {given}; gptjax supports only 1 with longrope")
    return Factors(long)


_READERS: Final[Mapping[str, Callable[[Keys, int], Scaling | None]]] = {
    "default": lambda section, context_length: None,
    "linear": _linear,
    "llama3": _llama3,
    "longrope": _factors,
    "yarn": _yarn,
}


def rope_to_json(rope: Rope) -> dict[str, Any]:
    """The inverse of `read_rope`: the keys to write."""
    written: dict[str, Any] = {}
    match rope.scaling:
        case None:
            return {"rope_theta": rope.theta}
        case Linear():
            written = {"rope_type": "linear", "factor": rope.scaling.factor}
        case Yarn():
            written = {
                "rope_type": "yarn",
                "factor": rope.scaling.factor,
                "original_max_position_embeddings": rope.scaling.original_length,
                "beta_fast": rope.scaling.beta_fast,
                "beta_slow": rope.scaling.beta_slow,
                "truncate": rope.scaling.truncate,
            }
        case Llama3():
            written = {
                "rope_type": "llama3",
                "factor": rope.scaling.factor,
                "original_max_position_embeddings": rope.scaling.original_length,
                "low_freq_factor": rope.scaling.low_freq_factor,
                "high_freq_factor": rope.scaling.high_freq_factor,
            }
        case Factors():
            divisors = list(rope.scaling.divisors)
            written = {
                "rope_type": "longrope",
                "short_factor": divisors,
                "long_factor": divisors,
                "attention_factor": 1.0,
            }
    return {"rope_theta": rope.theta, "rope_scaling": written}
