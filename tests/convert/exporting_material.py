"""What exports are checked with."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import convert
from tests.convert import made


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a directory, as the safetensors library reads them."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors = safetensors.numpy.load_file(path)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert made.same_bits(found[name], array), name


def exported(base: Path, source: Path, by: str, **arguments) -> Path:
    """The export of a Hugging Face directory as it is, or by way of a converted one."""
    if by == "converted":
        convert.convert(source, base / "converted")
        source = base / "converted"
    convert.export(source, base / "dst", **arguments)
    return base / "dst"


WAYS = pytest.mark.parametrize("by", ["directly", "converted"])
