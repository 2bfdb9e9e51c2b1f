from pallas_kernels.attention.api import attention
from pallas_kernels.attention.reference import paged

__all__ = ["attention", "paged"]
