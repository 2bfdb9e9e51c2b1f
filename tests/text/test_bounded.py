"""Limits for the texts of a prompt, with an encoder whose tokens are all of the same length."""

import pytest

from gptjax.errors import CapacityError
from gptjax.text.bounded import Bounds

MEGA = 1 << 20


def bounds(max_length: int, characters: int) -> Bounds:
    return Bounds(lambda text: [0] * (len(text) // characters), max_length)


def test_a_text_of_long_tokens_is_limited_by_its_characters() -> None:
    assert len(bounds(20_000, 128).joined("x" * MEGA)) == MEGA
    for pieces in ("x" * (MEGA + 1), ["x"] * (MEGA + 1)):
        with pytest.raises(CapacityError, match="more than 1048576 characters"):
            bounds(20_000, 128).joined(pieces)
    together = bounds(20_000, 128)
    together.joined("x" * MEGA)
    with pytest.raises(CapacityError, match="characters"):
        together.joined("x")


def test_a_text_of_short_tokens_is_limited_by_its_tokens() -> None:
    with pytest.raises(CapacityError, match="more than 1000 tokens"):
        bounds(1000, 4).joined("x" * MEGA)
