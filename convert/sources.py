"""A checkpoint's tensors as parameters, one at a time: from a Hugging Face directory, OpenAI's, or a GGUF file."""

from collections.abc import Callable, Iterator

import numpy as np

from convert import filling, gguf, matching
from convert.rules import Table
from convert.tables import table
from gptjax.checkpoints.checkpoint import Checkpoint, TensorSource
from gptjax.checkpoints.safetensors_header import NUMPY_DTYPES
from gptjax.checkpoints.weights import Path
from gptjax.errors import CheckpointError
from gptjax.gguf import GGUFFile
from gptjax.gguf.types import READ, USE_ANOTHER
from gptjax.models.params import abstract_params
from gptjax.models.registry import build
from gptjax.support.quoting import shown
from gptjax.support.raw import Buffers


def open_source(checkpoint: Checkpoint) -> tuple[matching.Plan, TensorSource]:
    """A checkpoint's tensors, and which of them fill which weight. Reads headers only.

    Raises:
      CheckpointError: its weights are missing, damaged or not those of its configuration's model.
    """
    source = checkpoint.source()
    if isinstance(source, GGUFFile):
        _check_types(source)
    targets = abstract_params(build(checkpoint.config))
    try:
        plan = matching.check(_table(checkpoint, source), source.tensors, targets)
    except CheckpointError as error:
        raise CheckpointError(f"{shown(checkpoint.path)} cannot be used: {error}") from None
    return plan, source


def open_params(checkpoint: Checkpoint) -> Iterator[tuple[Path, Callable[[], np.ndarray]]]:
    """Lazily yields each weight's path and a function that reads it, for `gptjax.checkpoints.weights.place`.

    Several of the functions may run at a time, in threads. Arrays have the file's dtypes, float32 if it is packed.
    Raises what `open_source` raises; the functions raise `CheckpointError`.
    """
    plan, source = open_source(checkpoint)
    source.buffers = Buffers()
    return filling.readers(plan, source)


def stored_dtypes(checkpoint: Checkpoint) -> dict[Path, str]:
    """How each weight is stored: a dtype, or a packed type of GGUF. Raises what `open_source` raises."""
    plan, source = open_source(checkpoint)
    return {fill.path: " and ".join(_stored(fill, source)) for fill in plan.fills}


def _check_types(file: GGUFFile) -> None:
    unread: dict[str, str] = {}
    for name, tensor in file.tensors.items():
        if tensor.type not in READ:
            unread.setdefault(tensor.type, name)
    if unread:
        found = ", ".join(f"{kind} ({shown(name)})" for kind, name in unread.items())
        path = next(iter(file.headers))
        raise CheckpointError(f"{shown(path)} has tensors of types that gptjax does not read: {found}; {USE_ANOTHER}")


def _stored(fill: matching.Fill, source: TensorSource) -> dict[str, None]:
    """The types of a weight's sources, each once."""
    if isinstance(source, GGUFFile):
        return dict.fromkeys(source.tensors[name].type for name in fill.sources)
    return dict.fromkeys(NUMPY_DTYPES[source.tensors[name].dtype].name for name in fill.sources)


def _table(checkpoint: Checkpoint, source: TensorSource) -> Table:
    return table(checkpoint.config, source.tensors) if checkpoint.gguf is None else gguf.table(checkpoint.config)
