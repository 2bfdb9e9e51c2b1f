from pallas_kernels.append.api import append, takes

__all__ = ["append", "takes"]
