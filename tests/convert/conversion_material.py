"""Weights as they are stored and as they were converted, and conversions in a process of their own."""

import subprocess
import sys
from pathlib import Path

import numpy as np

from convert import open_params
from gptjax.checkpoints import weights
from gptjax.checkpoints.checkpoint import open_path
from gptjax.config import read_config
from gptjax.models.params import abstract_params
from gptjax.models.registry import build
from tests.convert import made
from tests.oracles import gpt2_ours

ROOT = Path(__file__).resolve().parents[2]


def restored(directory: Path, dtype=np.float32) -> dict[str, np.ndarray]:
    return made.flat(weights.restore(directory, abstract_params(build(read_config(directory), dtype=dtype))))


def streamed(directory: Path) -> dict[str, np.ndarray]:
    return {"/".join(path): np.array(read()) for path, read in open_params(open_path(directory))}


def assert_holds(directory: Path, tensors, dtype=np.float32) -> None:
    found = restored(directory, dtype)
    assert len(found) == len(tensors)
    for name, array in tensors.items():
        assert made.same_bits(found[gpt2_ours.target(name)], array.astype(dtype))


CONVERT = """
import os, signal, sys
import convert.conversion, gptjax.checkpoints.atomic_directory, gptjax.checkpoints.saving, orbax.checkpoint
{before}
print("ready", flush=True)
convert.convert({source!r}, {destination!r}, overwrite={overwrite})
"""


def start(source: Path, destination: Path, *, before: str = "", overwrite: bool = False) -> subprocess.Popen:
    code = CONVERT.format(before=before, source=str(source), destination=str(destination), overwrite=overwrite)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n", process.stderr.read().decode()
    return process
