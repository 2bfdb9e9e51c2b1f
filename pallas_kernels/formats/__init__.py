"""Packed weights: each format's layout in one place, and how its bytes become numbers."""

from typing import Any


def is_packed(leaf: Any) -> bool:
    """Whether a leaf of parameters is a packed weight, of any format, and so a pytree itself."""
    return getattr(leaf, "is_packed_weight", False) is True
