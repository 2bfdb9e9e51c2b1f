"""How long fuzzers run: a little in every test run, `$FUZZ` times as long under `make fuzz`."""

import os
from typing import Final

TIMES: Final = int(os.environ.get("FUZZ", "1"))


def rounds(count: int) -> int:
    """How many random inputs to try, if an ordinary test run tries `count`."""
    return count * TIMES
