"""What tests of kernels need, and how kernels are lowered for CUDA where there is no GPU."""

import os
from collections.abc import Callable
from typing import Any

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels import dispatch

HAS_MOSAIC = jax.__version_info__ >= (0, 11)
needs_mosaic = pytest.mark.skipif(not HAS_MOSAIC, reason="the Mosaic kernels are for JAX 0.11 and newer")
needs_hopper = pytest.mark.skipif(dispatch.preferred() != dispatch.MOSAIC, reason="needs a Hopper GPU")


def lowered(function: Callable[..., Any], *operands: Any) -> str:
    """The text of a function's program for CUDA."""
    test = os.environ["PYTEST_CURRENT_TEST"]
    assert "/pallas_kernels/" not in test or "lower" in test.rpartition("::")[2], "`make lowering` goes by names"
    return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def lowered_for_h200(function: Callable[..., Any], *operands: Any) -> str:
    """The same where the kernel may ask for the device: Triton's lowering does, from JAX 0.11 on."""
    if not HAS_MOSAIC:
        return lowered(function, *operands)
    device = AbstractDevice(platform="gpu", device_kind="NVIDIA H200", num_cores=132)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        return lowered(function, *operands)
