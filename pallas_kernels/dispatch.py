"""Which implementation of an operation runs.

"auto" takes the best one for the operands and the device; a named one runs or raises. An implementation that was asked
for by name is never silently replaced by another.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

AUTO = "auto"
MOSAIC = "mosaic"  # Pallas Mosaic GPU: Hopper
TRITON = "triton"  # Pallas Triton: Ampere, Ada and other CUDA devices
XLA = "xla"  # jnp, which XLA compiles: everywhere
IMPLEMENTATIONS = (AUTO, MOSAIC, TRITON, XLA)
_MOSAIC_SINCE = (0, 11)  # JAX: older versions have another interface
# The file name of a kernel for one architecture says which.
_FILES = {MOSAIC: "mosaic_sm90"}


def choose(operation: str, implementation: str, available: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function to run.

    Args:
      available: the implementations that take these operands, on any device. "auto" takes `preferred()` if it is
        among them, else "xla".

    Raises:
      ValueError: `operation` has no such implementation, or not for these operands.
    """
    if implementation == AUTO:
        return available.get(preferred(), available[XLA])
    if implementation not in available:
        raise ValueError(
            f"{operation} has no implementation {implementation!r} for these operands; it has {', '.join(available)}"
        )
    return available[implementation]


def wanted(implementation: str) -> str:
    """The implementation to look for first.

    Kernels are imported only if they may run, because importing them is slow and not every JAX can.
    """
    wanted = preferred() if implementation == AUTO else implementation
    return XLA if wanted == MOSAIC and jax.__version_info__ < _MOSAIC_SINCE else wanted


@functools.cache
def preferred() -> str:
    """What "auto" takes on this process's devices if it can."""
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "")
    if device.platform != "gpu" or not capability[:1].isdigit():  # on a ROCm device it is a name
        return XLA
    if capability == "9.0":
        return MOSAIC if jax.__version_info__ >= _MOSAIC_SINCE else TRITON
    return TRITON if float(capability) >= 8 else XLA


@functools.cache
def device_kind() -> str:
    """JAX's name for this process's devices, which the tables of `tiles` go by."""
    return jax.devices()[0].device_kind


def module(kernel: str) -> str:
    """The module of a kernel "<operation>/<implementation>", for example "matvec/mosaic"."""
    operation, implementation = kernel.split("/")
    return f"pallas_kernels.{operation}.{_FILES.get(implementation, implementation)}"


def has_kernel(operation: str, implementation: str) -> bool:
    """Whether an operation's folder holds a kernel of this implementation."""
    file = f"{_FILES.get(implementation, implementation)}.py"
    return any((Path(__file__).parent / operation).rglob(file))
