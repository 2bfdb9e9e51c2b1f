"""How long fuzzers run: `$FUZZ` times what `make full` tries; `make test` tries a tenth."""

import os
from typing import Final

TIMES: Final = float(os.environ.get("FUZZ", "1"))


def rounds(count: int) -> int:
    """How many random inputs to try, if `make full` tries `count`."""
    return max(1, round(count * TIMES))
