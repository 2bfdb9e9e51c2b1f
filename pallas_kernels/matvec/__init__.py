from pallas_kernels.matvec.api import (
    FEW,
    PACKED_FEW,
    Fragments,
    matvec,
    normed_gated,
    normed_matvec,
    packed_gated,
    packed_matvec,
    repacked,
    repacking,
    takes_gated,
    takes_normed,
    takes_normed_gated,
)
from pallas_kernels.matvec.row_norm import RowNorm

__all__ = [
    "FEW",
    "PACKED_FEW",
    "Fragments",
    "RowNorm",
    "matvec",
    "normed_gated",
    "normed_matvec",
    "packed_gated",
    "packed_matvec",
    "repacked",
    "repacking",
    "takes_gated",
    "takes_normed",
    "takes_normed_gated",
]
