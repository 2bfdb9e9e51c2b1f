from pallas_kernels.add_norm.api import add_norm, add_norm_route

__all__ = ["add_norm", "add_norm_route"]
