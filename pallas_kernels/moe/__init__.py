from pallas_kernels.moe.api import moe

__all__ = ["moe"]
