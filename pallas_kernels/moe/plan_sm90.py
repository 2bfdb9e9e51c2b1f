"""What the product with a few tokens of each expert knows when it is built."""

import dataclasses
from typing import Final

from pallas_kernels.formats.fragments import TILE

EIGHT: Final = 8  # tokens per instruction


@dataclasses.dataclass(frozen=True)
class ExpertsPlan:
    """Of the kernel `mosaic_sm90`."""

    num_experts: int  # E: expert id E or above, or below 0, marks an empty group
    num_groups: int  # U
    slots: int  # M: tokens per group, at most
    steps: int  # 64-column tiles of a run
    runs: int  # that the columns are divided into
    splits: int  # blocks that share the runs, evenly; with an activation, they are a cluster
    tiles: int  # 64-row tiles per expert
    unroll: int  # tiles whose loads are in flight while as many are computed
    eights: int  # groups of eight tokens that a block computes
    sorted: bool  # x has one row per slot; otherwise one per token

    @property
    def columns(self) -> int:
        """Columns of the weight."""
        return self.steps * self.runs * TILE

    @property
    def own(self) -> int:
        """Runs of a block."""
        return self.runs // self.splits

    @property
    def sums(self) -> int:
        """Sums of a thread."""
        return 4 * self.eights

    @property
    def rows(self) -> int:
        """Rows of an expert's weight."""
        return self.tiles * TILE
