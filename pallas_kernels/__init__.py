"""Array operations for decoder-only transformers: a jnp reference for each, and kernels where XLA is not enough.

Arrays in, arrays out: nothing here knows a model or a config. Imports only JAX and NumPy.
"""
