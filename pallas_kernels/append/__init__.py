from pallas_kernels.append.reference import write_rows, write_tiles

__all__ = ["write_rows", "write_tiles"]
