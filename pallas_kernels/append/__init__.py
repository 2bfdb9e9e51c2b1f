from pallas_kernels.append.api import append, takes
from pallas_kernels.append.reference import write

__all__ = ["append", "takes", "write"]
