from pallas_kernels.matvec.api import FEW, matvec

__all__ = ["FEW", "matvec"]
