"""Everything that is known when the kernel is built, and the shared memory that it takes."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block.stream import PANEL
from pallas_kernels.pages import PAGE

TILE_ROWS = 64  # of a tile of a matrix, which one copy brings; 16 rows for each of four warps
THREADS, WARPS = 256, 8
QKV = 3  # panels per cluster in the product that gives queries, keys and values
HIDDEN = 4  # panels of hidden units per cluster
# Of a mailbox: three for queries, keys and values, the first of which the hidden units' sums reuse, and one for what is
# added to the residual. A block may send the latter while another still reads the last of the others.
SLOTS = QKV + 1
RESIDUAL_SLOT = QKV
MOST_STAGES = 24
TOGETHER = 4  # tiles whose stages are refilled together
EXCHANGES = 5
QKV_BYTES = 2 * (QKV * PANEL + 8)  # between rows of queries, keys and values in shared memory
RECORD = 4 * 68  # bytes of a running softmax: 64 sums, the maximum, the total, and padding
TILE_BYTES = 2 * TILE_ROWS * PANEL
SUMS_BYTES = 4 * 8 * THREADS
# Bytes of shared memory per block, which has a multiprocessor to itself, less an allowance for rounding.
_ROOM = 212 * 1024


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """Everything that is known when the kernel is built."""

    rows: int  # T
    panels: int  # N: panels of D, and clusters
    blocks: int  # per cluster
    pages: int  # Z: of a row's table
    scale: float  # of attention's scores
    epsilon: float  # of the norms

    @property
    def places(self) -> int:
        """Places of a row's pages."""
        return PAGE * self.pages

    @property
    def width(self) -> int:
        """D."""
        return PANEL * self.panels

    @property
    def share(self) -> int:
        """Tiles per block along D. Some of the last blocks' may lie beyond the matrix."""
        return -(-self.panels // self.blocks)

    @property
    def hidden_share(self) -> int:
        """Tiles per block along the hidden units."""
        return -(-HIDDEN * self.panels // self.blocks)

    @property
    def tiles(self) -> int:
        """Tiles per block: for queries, keys and values, for attention's output, and for the MLP's products."""
        return (QKV + 1 + HIDDEN) * self.share + self.hidden_share

    @staticmethod
    def row_bytes(share: int) -> int:
        """Bytes between rows of a factor in shared memory, such that eight rows lie in different banks."""
        return 2 * TILE_ROWS * share + 16

    @property
    def mailbox(self) -> int:
        """Float32 numbers that a block receives for one panel's sums."""
        return self.blocks * self.rows * PANEL

    @property
    def stages(self) -> int:
        """Tiles in flight per block."""
        return min(self.tiles, MOST_STAGES, (_ROOM - sum(self._small.values())) // TILE_BYTES)

    @property
    def _small(self) -> dict[str, int]:
        """Bytes of shared memory by name, without the ring."""
        return {
            "factor": self.rows * self.row_bytes(self.share),
            "second": self.rows * self.row_bytes(self.hidden_share),
            "statistics": 8 * self.rows,
            "sums": HIDDEN * SUMS_BYTES,
            "mailbox": 4 * SLOTS * self.mailbox,
            "qkv": self.rows * QKV_BYTES,
            "records": self.rows * self.blocks * RECORD,
            "filled": 8 * MOST_STAGES,
            "mbarriers": 8 * EXCHANGES,
        }

    def shared(self) -> dict[str, Any]:
        """Shared memory by name."""
        sizes = {name: -(-size // 16) * 4 for name, size in self._small.items()}
        ring = plgpu.SMEM((self.stages, TILE_ROWS, PANEL), jnp.bfloat16)
        return {"ring": ring} | {name: plgpu.SMEM((size,), jnp.uint32) for name, size in sizes.items()}
