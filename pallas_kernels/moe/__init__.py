from pallas_kernels.moe.api import moe, repacked

__all__ = ["moe", "repacked"]
