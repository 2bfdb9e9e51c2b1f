"""Which implementation of an operation runs.

"auto" takes the best one there is for the operands and the device; a named one runs or raises. Nothing that was asked
for by name is silently replaced by something else.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

AUTO = "auto"
MOSAIC = "mosaic"  # Pallas Mosaic GPU: Hopper
TRITON = "triton"  # Pallas Triton: Ampere, Ada, and what else CUDA has
XLA = "xla"  # jnp, which XLA compiles: everywhere
IMPLEMENTATIONS = (AUTO, MOSAIC, TRITON, XLA)
_MOSAIC_SINCE = (0, 11)  # JAX; its interface was another before
# Kernels for one architecture have its name in their file's.
_FILES = {MOSAIC: "mosaic_sm90"}


def choose(operation: str, implementation: str, available: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function to run.

    Args:
      available: what the operation has for these operands, on whatever device. "auto" takes `preferred()` if it is
        among them, else "xla".

    Raises:
      ValueError: `implementation` names one that `operation` does not have, or not for these operands.
    """
    if implementation == AUTO:
        return available.get(preferred(), available[XLA])
    if implementation not in available:
        raise ValueError(
            f"{operation} has no implementation {implementation!r} for these operands; it has {', '.join(available)}"
        )
    return available[implementation]


def wanted(implementation: str) -> str:
    """What to look for first: kernels are imported where they may run, for that takes long and not every JAX can."""
    wanted = preferred() if implementation == AUTO else implementation
    return XLA if wanted == MOSAIC and jax.__version_info__ < _MOSAIC_SINCE else wanted


@functools.cache
def preferred() -> str:
    """What "auto" takes on this process's devices where it can."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "")
    if device.platform != "gpu" or not capability[:1].isdigit():  # of a ROCm device it is a name
        return XLA
    if capability == "9.0":
        return MOSAIC if jax.__version_info__ >= _MOSAIC_SINCE else TRITON
    return TRITON if float(capability) >= 8 else XLA


@functools.cache
def device_kind() -> str:
    """Of this process's devices, as JAX names it: what the tables of `tiles` are for."""
    return jax.devices()[0].device_kind


def module(kernel: str) -> str:
    """The module of a kernel "<operation>/<implementation>", such as "matvec/mosaic"."""
    operation, implementation = kernel.split("/")
    return f"pallas_kernels.{operation}.{_FILES.get(implementation, implementation)}"


def has_kernel(operation: str, implementation: str) -> bool:
    """Whether an operation's folder holds a kernel of this implementation."""
    file = f"{_FILES.get(implementation, implementation)}.py"
    return any((Path(__file__).parent / operation).rglob(file))
