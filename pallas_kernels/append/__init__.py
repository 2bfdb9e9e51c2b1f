from pallas_kernels.append.api import append_heads, takes_heads
from pallas_kernels.append.reference import write_rows, write_tiles

__all__ = ["append_heads", "takes_heads", "write_rows", "write_tiles"]
