from pallas_kernels.matvec.api import FEW, Fragments, matvec, packed_gated, packed_matvec, repacked, takes_gated

__all__ = ["FEW", "Fragments", "matvec", "packed_gated", "packed_matvec", "repacked", "takes_gated"]
