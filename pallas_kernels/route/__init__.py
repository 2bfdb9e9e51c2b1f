from pallas_kernels.route.api import norm_route, route

__all__ = ["norm_route", "route"]
