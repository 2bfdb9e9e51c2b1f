"""The product in jnp."""

from pallas_kernels.same_bits import product

__all__ = ["product"]
