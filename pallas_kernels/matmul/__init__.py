"""Many rows times a matrix."""

from pallas_kernels.matmul.api import matmul

__all__ = ["matmul"]
