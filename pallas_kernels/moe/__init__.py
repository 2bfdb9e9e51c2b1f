from pallas_kernels.moe.api import moe, repacked, repacking

__all__ = ["moe", "repacked", "repacking"]
