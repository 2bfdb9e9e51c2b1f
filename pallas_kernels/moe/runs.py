"""How the Hopper kernels divide the columns of the product down, which are an expert's units."""

import math
from typing import Final

from pallas_kernels.formats.fragments import TILE

_RUNS: Final = 3  # if the columns can be divided so


def runs_of_width(width: int) -> int:
    """The runs of an expert with so many units. With few tokens, one block for all columns would be too few blocks."""
    return math.gcd(_RUNS, width // TILE)


def unit_of_parts(width: int) -> int:
    """What a device's part of the units should be a multiple of, to have as many runs as all of them.

    (Of gpt-oss's 45 tiles, half are 23. Those have one run, and 23 is a prime number, so tiles would be loaded one at
    a time: on an H200, down took 12.4 us at one row, where all 45 tiles take 7.7.)
    """
    return runs_of_width(width) * TILE
