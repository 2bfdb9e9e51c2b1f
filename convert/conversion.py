"""A whole conversion: a Hugging Face directory to parameters or to a converted directory."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from convert import DTYPES, quantization, rules
from convert.sources import foreign, safetensors
from convert.sources.header import NUMPY_DTYPES, TensorInfo
from convert.tables import table
from gptjax import checkpoint
from gptjax.config import ModelConfig, read_config, text_directory
from gptjax.config.keys import without
from gptjax.errors import CheckpointError
from gptjax.files import read_json
from gptjax.models.registry import abstract_params, build, num_params
from gptjax.progress import Progress
from pallas_kernels.mxfp4 import MXFP4

COPIED: Final = (  # what a converted directory takes over, where it is there
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a conversion did."""

    destination: Path
    num_weights: int  # arrays; a weight in MXFP4 is two
    num_params: int  # numbers, packed or not
    bytes: int  # of the weights as written
    dtypes: tuple[str, ...]
    seconds: float


def convert(
    source: str | PathLike[str],
    destination: str | PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
    ignore_config: Sequence[str] = (),
    progress: Progress | None = None,
) -> Summary:
    """Writes a Hugging Face checkpoint directory as a converted directory, in bounded memory.

    Everything that headers and configuration can tell is checked before the first byte is written, and the
    destination appears complete or not at all.

    Args:
      source: a directory with `config.json` and safetensors files.
      destination: the directory to make; its parent must exist.
      dtype: float32, bfloat16 or float16 for all floating weights; None keeps what each tensor has.
      quantize: "experts", "linear" or "all": which weights are rounded to MXFP4, from the values they have in the
        source, see `gptjax.config.quantization`. What is in MXFP4 already stays as it is, bit for bit.
      overwrite: replace the destination, if it is a converted directory.
      ignore_config: keys to leave out of config.json, as for `gptjax.load`; the destination has it without them.
      progress: shows how far it is; see `gptjax.progress.progress`.

    Raises:
      ConfigError: a model, or a setting of it, that is not supported; weights that cannot be in MXFP4.
      CheckpointError: a source that is missing, damaged or does not fit its configuration; a destination that cannot
        be written. Nothing is left behind.
    """
    started = time.monotonic()
    source, destination = Path(source), Path(destination)
    if "\0" in f"{source}{destination}":
        raise CheckpointError("a path has a NUL character; name another directory")
    _check_paths(source, destination)
    wanted = None if dtype is None else _dtype(dtype)
    config = read_config(source, ignore=ignore_config)
    target = config if quantize is None else quantization.packed_config(config, quantize)
    plan, reader = _open(source, config)
    chosen = quantization.chosen(config, target)
    copies = [source / "config.json"]
    copies += [text_directory(source) / name for name in COPIED if (text_directory(source) / name).is_file()]
    index = [source / safetensors.INDEX] if (source / safetensors.INDEX).is_file() else []
    with _Hashes((*copies, *index, *reader.files)) as hashes, _telling(copies, config, target, ignore_config) as copies:
        manifest = checkpoint.save(
            destination,
            _leaves(plan, reader, wanted, chosen),
            total_bytes=sum(_written_bytes(fill, reader, wanted, chosen) for fill in plan.fills),
            source=source.resolve().name,
            source_files=hashes.result,
            copies=copies,
            overwrite=overwrite,
            progress=progress,
        )
    return Summary(
        destination=destination,
        num_weights=len(manifest.leaves),
        num_params=num_params(build(target)),
        bytes=sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in manifest.leaves),
        dtypes=tuple(sorted({leaf.dtype for leaf in manifest.leaves})),
        seconds=time.monotonic() - started,
    )


def stream_params(directory: str | PathLike[str], config: ModelConfig) -> Iterator[tuple[checkpoint.Path, np.ndarray]]:
    """Path and array of each weight of a Hugging Face directory, lazily, for `gptjax.checkpoint.place`.

    The directory is checked by this call already, from headers; data is read as the iterator goes on. Arrays are
    views of the files where possible, in the files' dtypes.

    Raises:
      CheckpointError: the directory's weights are missing, damaged or not those of the configuration's model.
    """
    plan, reader = _open(Path(directory), config)
    return rules.stream(plan, reader)


def open_params(
    directory: str | PathLike[str], config: ModelConfig
) -> Iterator[tuple[checkpoint.Path, Callable[[], np.ndarray]]]:
    """As `stream_params`, with what reads the array in its place: `gptjax.checkpoint.place` reads several at a time."""
    plan, reader = _open(Path(directory), config)
    return rules.readers(plan, reader)


def stored_dtypes(directory: str | PathLike[str], config: ModelConfig) -> dict[checkpoint.Path, str]:
    """The dtype that each weight has in a Hugging Face directory, which is checked from its headers; no data is read.

    Raises:
      CheckpointError: as `stream_params`.
    """
    plan, reader = _open(Path(directory), config)
    return {fill.path: NUMPY_DTYPES[reader.tensors[fill.sources[0]].dtype].name for fill in plan.fills}


def _open(source: Path, config: ModelConfig) -> tuple[rules.Plan, safetensors.SafetensorsSource]:
    reader = safetensors.open_directory(source)
    targets = abstract_params(build(config))
    try:
        plan = rules.check(table(config, reader.tensors), reader.tensors, targets)
    except CheckpointError as error:
        raise CheckpointError(f"{source} cannot be used: {error}") from None
    return plan, reader


def _dtype(dtype: DTypeLike) -> np.dtype[Any]:
    try:
        found = np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        raise CheckpointError(f"weights cannot be converted to {dtype}; use {', '.join(DTYPES)}")
    return found


def _check_paths(source: Path, destination: Path) -> None:
    if source.is_file():
        foreign.refuse(source)
        raise CheckpointError(f"{source} is a file; name the directory that it is in: {source.absolute().parent}")
    if not source.is_dir():
        raise CheckpointError(
            f"{source} does not exist; name a directory with config.json, *.safetensors and tokenizer.json"
        )
    if checkpoint.is_converted(source):
        raise CheckpointError(f"{source} is converted already; name the Hugging Face directory that it was made of")
    inside, outside = destination.resolve(), source.resolve()
    if inside == outside:
        raise CheckpointError(f"source and destination are the same directory, {source}; name another destination")
    if outside in inside.parents or inside in outside.parents:
        raise CheckpointError(f"{destination} and {source} lie one inside the other; name a destination elsewhere")


def _leaves(
    plan: rules.Plan,
    reader: safetensors.SafetensorsSource,
    wanted: np.dtype[Any] | None,
    chosen: Mapping[checkpoint.Path, MXFP4],
) -> Iterator[tuple[checkpoint.Path, np.ndarray]]:
    """Path and array of everything to write."""
    for path, array in rules.stream(plan, reader):
        if path in chosen:
            blocks, scales = quantization.rounded(path, array)
            yield (*path, "blocks"), blocks
            yield (*path, "scales"), scales
            del blocks, scales
        else:
            if wanted is not None and jnp.issubdtype(array.dtype, jnp.floating):
                array = checkpoint.cast(array, wanted, "/".join(path))
            yield path, array
        del array


def _written_bytes(
    fill: rules.Fill,
    reader: safetensors.SafetensorsSource,
    wanted: np.dtype[Any] | None,
    chosen: Mapping[checkpoint.Path, MXFP4],
) -> int:
    if fill.path in chosen:
        return chosen[fill.path].nbytes
    return sum(_bytes(reader.tensors[name], wanted) for name in fill.sources)


def _bytes(info: TensorInfo, wanted: np.dtype[Any] | None) -> int:
    own = NUMPY_DTYPES[info.dtype]
    return math.prod(info.shape) * int((own if wanted is None or info.dtype not in rules.FLOATS else wanted).itemsize)


@contextlib.contextmanager
def _telling(
    copies: list[Path], config: ModelConfig, target: ModelConfig, ignored: Sequence[str]
) -> Iterator[list[Path]]:
    """The files to copy, with a `config.json` of the target: without ignored keys, and saying what is packed."""
    if target == config and not ignored:
        yield copies
        return
    with tempfile.TemporaryDirectory() as scratch:
        rewritten = Path(scratch) / "config.json"
        (own,) = (path for path in copies if path.name == rewritten.name)
        raw = dict(without(read_json(own) or {}, ignored))
        if target != config:
            raw = quantization.config_json(raw, target)
        rewritten.write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        yield [rewritten if path is own else path for path in copies]


class _Hashes:
    """SHA-256 of files, worked out in a thread while other things are done."""

    def __init__(self, files: tuple[Path, ...]):
        self._files = files
        self._cancelled = threading.Event()
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._future = self._pool.submit(lambda: tuple(map(self._hash, files)))

    def __enter__(self) -> "_Hashes":
        return self

    def __exit__(self, *_: object) -> None:
        self._cancelled.set()
        self._pool.shutdown()

    def result(self) -> tuple[checkpoint.SourceFile, ...]:
        try:
            return self._future.result()
        except OSError as error:
            raise CheckpointError(f"{error.filename} cannot be read ({error.strerror}); check the file") from None

    def _hash(self, path: Path) -> checkpoint.SourceFile:
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as file:
            while not self._cancelled.is_set() and (block := file.read(1 << 20)):
                digest.update(block)
                size += len(block)
        return checkpoint.SourceFile(path.name, size, digest.hexdigest())
