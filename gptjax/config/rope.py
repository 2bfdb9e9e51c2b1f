"""Rotary positions, as a config describes them."""

import dataclasses
import math
from typing import Any

from gptjax.config.keys import Keys

_MOST = 1e9  # beyond any meaningful setting


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
class Rope:
    """Rotary position embedding."""

    theta: float  # the base: frequency i is theta^(-2i/H)
    yarn: Yarn | None = None


def read_rope(keys: Keys, context_length: int, *, absent: Rope) -> Rope:
    """Reads `rope_parameters`, or the older `rope_scaling` and `rope_theta`.

    Args:
      keys: those of config.json; faults are noted there.
      context_length: the original length if YaRN's own `original_max_position_embeddings` is absent.
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
        kind = section.choice("rope_type", {"yarn": "yarn", "default": "default"}, alias="type", absent="default")
        found[name] = Rope(inner, _yarn(section, context_length) if kind == "yarn" else None)
        keys.take(name, section)
    if len(set(found.values())) > 1:
        keys.fault(f"{' and '.join(found)} differ: they mean the same and must agree")
    if "rope_parameters" in found or not keys.empty("rope_parameters"):
        rope = next(iter(found.values()), dataclasses.replace(absent, theta=theta))
    else:  # transformers takes an empty one for rotation without YaRN
        rope = Rope(theta)
    check_rope(rope, keys)
    return rope


def check_rope(rope: Rope, keys: Keys) -> None:
    """Notes a fault for each value that no rotation can have."""
    if not 1 < rope.theta <= _MOST:
        keys.fault(f"rope_theta is {rope.theta}; expected more than 1, and at most {_MOST}")
    if (yarn := rope.yarn) is None:
        return
    if not 1 <= yarn.factor <= _MOST:
        keys.fault(f"YaRN's factor is {yarn.factor}; expected at least 1: it says how far positions are stretched")
    if not 1 / _MOST <= yarn.beta_slow <= yarn.beta_fast <= _MOST:
        keys.fault(
            f"YaRN's beta_fast is {yarn.beta_fast} and beta_slow {yarn.beta_slow}; expected beta_fast to be at least "
            f"beta_slow, and both from {1 / _MOST} to {_MOST}"
        )


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


def rope_to_json(rope: Rope) -> dict[str, Any]:
    """The inverse of `read_rope`: the keys to write."""
    raw: dict[str, Any] = {"rope_theta": rope.theta}
    if (yarn := rope.yarn) is not None:
        raw["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_length,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "truncate": yarn.truncate,
        }
    return raw
