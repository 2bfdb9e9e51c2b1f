from pallas_kernels.route.api import norm_route

__all__ = ["norm_route"]
