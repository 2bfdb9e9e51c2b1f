"""What is known when the kernel is built, and the shared memory that this takes."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block.stream import STRIP

BOX = 64  # rows of a matrix that are copied together, 16 for each of four warps
THREADS, WARPS = 256, 8
QKV = 3  # strips of a cluster in the product that gives queries, keys and values
HIDDEN = 4  # strips of a cluster of the hidden units
# Of an inbox: three for queries, keys and values, the first of which the hidden units' sums use again, and one for what
# is added to the residual. A block may send this while another still reads the last of the others.
SLOTS = QKV + 1
RESIDUAL_SLOT = QKV
MOST_STAGES = 24
TOGETHER = 4  # boxes whose slots are filled again together
EXCHANGES = 5
QKV_BYTES = 2 * (QKV * STRIP + 8)  # from row to row of queries, keys and values in shared memory
RECORD = 4 * 68  # bytes of a running softmax: 64 sums, the maximum, the total, and what aligns the next
BOX_BYTES = 2 * BOX * STRIP
SUMS_BYTES = 4 * 8 * THREADS
# Bytes of shared memory of a block, which has a multiprocessor to itself, but for what rounding takes.
_ROOM = 212 * 1024


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known when a kernel is built."""

    rows: int  # T
    strips: int  # N: of D, and clusters
    blocks: int  # C: of a cluster
    places: int  # S: of the cache
    scale: float  # of attention's scores
    epsilon: float  # of the norms

    @property
    def width(self) -> int:
        """D."""
        return STRIP * self.strips

    @property
    def share(self) -> int:
        """Boxes of a block along D. The last blocks may have some that are beyond the matrix."""
        return -(-self.strips // self.blocks)

    @property
    def hidden_share(self) -> int:
        """Boxes of a block along the hidden units."""
        return -(-HIDDEN * self.strips // self.blocks)

    @property
    def boxes(self) -> int:
        """Of a block: of queries, keys and values, of attention's output, and of the MLP's products."""
        return (QKV + 1 + HIDDEN) * self.share + self.hidden_share

    @staticmethod
    def row_bytes(share: int) -> int:
        """From row to row of a factor in shared memory, so that eight rows lie in different banks."""
        return 2 * BOX * share + 16

    @property
    def inbox(self) -> int:
        """Float32 numbers that a block gets of one strip's sums."""
        return self.blocks * self.rows * STRIP

    @property
    def stages(self) -> int:
        """Boxes of a block in flight."""
        return min(self.boxes, MOST_STAGES, (_ROOM - sum(self._small.values())) // BOX_BYTES)

    @property
    def _small(self) -> dict[str, int]:
        """Bytes of shared memory by name."""
        return {
            "factor": self.rows * self.row_bytes(self.share),
            "second": self.rows * self.row_bytes(self.hidden_share),
            "statistics": 8 * self.rows,
            "sums": HIDDEN * SUMS_BYTES,
            "inbox": 4 * SLOTS * self.inbox,
            "qkv": self.rows * QKV_BYTES,
            "records": self.rows * self.blocks * RECORD,
            "filled": 8 * MOST_STAGES,
            "meetings": 8 * EXCHANGES,
        }

    def scratch(self) -> dict[str, Any]:
        """Shared memory by name."""
        sizes = {name: -(-size // 16) * 4 for name, size in self._small.items()}
        boxes = plgpu.SMEM((self.stages, BOX, STRIP), jnp.bfloat16)
        return {"boxes": boxes} | {name: plgpu.SMEM((size,), jnp.uint32) for name, size in sizes.items()}
