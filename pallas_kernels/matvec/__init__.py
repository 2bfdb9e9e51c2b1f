from pallas_kernels.matvec.api import (
    FEW,
    PACKED_FEW,
    Fragments,
    matvec,
    packed_gated,
    packed_matvec,
    repacked,
    repacking,
    takes_gated,
)

__all__ = [
    "FEW",
    "PACKED_FEW",
    "Fragments",
    "matvec",
    "packed_gated",
    "packed_matvec",
    "repacked",
    "repacking",
    "takes_gated",
]
