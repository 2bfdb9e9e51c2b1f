from pallas_kernels.route.api import route

__all__ = ["route"]
