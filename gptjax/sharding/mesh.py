"""The mesh: devices in a grid, whose axes are what is divided among them."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from gptjax.errors import RequestError
from gptjax.support.quoting import quoted

DATA: Final = "data"  # rows of a call
TENSOR: Final = "tensor"  # heads, widths and the vocabulary
EXPERT: Final = "expert"  # experts
AXES: Final = (DATA, TENSOR, EXPERT)


def as_mesh(given: Mesh | Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with all of `AXES`, of size 1 where nothing else is said.

    Args:
      given: sizes by name, such as `{"tensor": 4}`; or a mesh whose axes have these names.
      devices: of which a mesh of sizes takes the first; by default all.

    Raises:
      RequestError: an unknown axis, a size that is not a positive number, or too few devices, or none of some process.
    """
    if isinstance(given, Mesh):
        sizes = _checked(dict(given.shape))
        order = [name for name in AXES if name in given.axis_names]
        grid = given.devices.transpose([given.axis_names.index(name) for name in order])
        return Mesh(grid.reshape(sizes), AXES)
    sizes = _checked(given)
    available = list(jax.devices() if devices is None else devices)
    if math.prod(sizes) > len(available):
        raise RequestError(
            f"a mesh of {described(given)} needs {math.prod(sizes)} devices, and there are {len(available)}: "
            "choose smaller sizes"
        )
    taken = available[: math.prod(sizes)]
    if devices is None and len({device.process_index for device in taken}) < jax.process_count():
        raise RequestError(
            f"a mesh of {described(given)} leaves out devices of some processes: choose sizes whose product is "
            f"{len(available)}, the devices that the {jax.process_count()} processes have together"
        )
    return Mesh(np.array(taken).reshape(sizes), AXES)


def planned(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of devices that need not be there, to see what each would have. Raises `RequestError`."""
    return AbstractMesh(_checked(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def described(sizes: Mapping[str, int]) -> str:
    """Sizes as they are written on the command line: data=2,tensor=4."""
    return ",".join(f"{name}={size}" for name, size in sizes.items()) or "no axes"


def parsed(text: str) -> dict[str, int]:
    """The sizes that a text such as "data=2,tensor=4" names. Raises `RequestError`."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name.strip() in found or not size.strip().isdecimal():
            raise RequestError(f"a mesh is written as in tensor=4 or tensor=2,expert=4, found {quoted(text)}")
        found[name.strip()] = int(size)
    _checked(found)
    return found


def _checked(given: Mapping[str, int]) -> tuple[int, ...]:
    if unknown := [name for name in given if name not in AXES]:
        raise RequestError(f"a mesh has no axis {quoted(unknown[0])}; its axes are {', '.join(AXES)}")
    for name, size in given.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise RequestError(f"the mesh's axis {name} must be a whole number from 1, found {quoted(size)}")
    return tuple(given.get(name, 1) for name in AXES)
