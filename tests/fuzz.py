"""How long fuzzers run: `$FUZZ` times what .ci/run tries; `make quick` and `make test` try a tenth."""

import os
from typing import Final

TIMES: Final = float(os.environ.get("FUZZ", "1"))


def rounds(count: int) -> int:
    """How many random inputs to try, if a full run tries `count`."""
    return max(1, round(count * TIMES))
