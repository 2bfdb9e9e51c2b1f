from pallas_kernels.append.api import append, takes
from pallas_kernels.append.reference import write_rows, write_tiles

__all__ = ["append", "takes", "write_rows", "write_tiles"]
