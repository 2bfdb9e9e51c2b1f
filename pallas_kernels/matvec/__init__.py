from pallas_kernels.matvec.api import FEW, Fragments, matvec, packed_matvec, repacked

__all__ = ["FEW", "Fragments", "matvec", "packed_matvec", "repacked"]
