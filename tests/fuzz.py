"""How long fuzzers run: `$FUZZ` times what `make full` tries; .ci/run tries 0.3 of it, `make test` a tenth."""

import os
from typing import Final

TIMES: Final = float(os.environ.get("FUZZ", "1"))


def rounds(count: int) -> int:
    """How many random inputs to try, if `make full` tries `count`."""
    return max(1, round(count * TIMES))
