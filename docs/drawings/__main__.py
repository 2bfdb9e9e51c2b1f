"""Draws the pictures of docs/pictures.md that show what the code says: `python docs/drawings docs/images`."""

import sys
from pathlib import Path

import attention
import blocks
import cache


def drawings() -> dict[str, str]:
    """The text of each file."""
    drawn = {"blocks": blocks.draw(), "attention": attention.draw(), "cache": cache.draw()}
    return {f"{name}.svg": str(drawing) for name, drawing in drawn.items()}


if __name__ == "__main__":
    for name, text in drawings().items():
        Path(sys.argv[1], name).write_text(text, encoding="utf-8")
