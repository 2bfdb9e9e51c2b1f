"""Weights by their paths in nested dicts, and how they get from a converted directory onto devices."""

import concurrent.futures
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any, Final, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from gptjax.checkpoints.manifest import Manifest, read_manifest
from gptjax.checkpoints.orbax_piece import check_piece, read_leaf
from gptjax.errors import CheckpointError
from gptjax.support.progress import Progress, silent
from gptjax.support.quoting import listed, names
from gptjax.support.raw import Buffers

Path = tuple[str, ...]  # to a weight in the nested dicts of parameters
Params = dict[str, Any]

_Result = TypeVar("_Result")
_WORKERS: Final = 8  # weights moved to a device at a time


def flatten(tree: Mapping[str, Any]) -> dict[Path, Any]:
    """The leaves of nested dicts by path. A packed weight gives two: …/blocks and …/scales."""
    return {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _names(path: tuple[Any, ...]) -> Path:
    return tuple(_name(key) for key in path)


def _name(key: Any) -> str:
    if isinstance(key, jax.tree_util.SequenceKey):
        return str(key.idx)
    return str(key.key if isinstance(key, jax.tree_util.DictKey) else key.name)


def nest(flat: Mapping[Path, Any]) -> Params:
    """Nested dicts from leaves by path."""
    tree: Params = {}
    for path, leaf in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def cast(array: np.ndarray, dtype: DTypeLike, name: str) -> np.ndarray:
    """The array in another floating-point dtype, rounded to nearest, ties to even; itself if the dtype is the same.

    Raises:
      CheckpointError: a dtype is not floating-point, or float16 cannot hold the values. `name` is for the message.
    """
    dtype = np.dtype(dtype)
    if array.dtype == dtype:
        return array
    if not (jnp.issubdtype(array.dtype, jnp.floating) and jnp.issubdtype(dtype, jnp.floating)):
        raise CheckpointError(f"{name} is {array.dtype} and cannot become {dtype}; only floating-point weights can")
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if dtype == np.float16 and not np.isfinite(result).all():
        raise CheckpointError(f"{name} has values beyond float16's 65504; use bfloat16 or float32")
    return result


def place(
    leaves: Iterable[tuple[Path, np.ndarray | Callable[[], np.ndarray]]],
    targets: Mapping[str, Any],
    *,
    progress: Progress | None = None,
    put: Callable[[Path, np.ndarray], jax.Array] | None = None,
) -> Params:
    """Puts weights on devices, cast to the requested dtypes, in bounded host memory.

    The result owns its memory: it does not change with a file that an array is a view of, and may be donated.

    Args:
      leaves: path and host array of each weight, in any order; or a function that reads the array, several of which
        run at a time if the device is not the CPU. (On an H200, one thread reads 4.3 GB/s from the file cache, and
        moves 5.2 GB/s to the device.)
      targets: nested dicts of `jax.ShapeDtypeStruct`: shape, dtype and, if set, sharding.
      progress: reports progress; see `gptjax.support.progress`.
      put: puts an array of the target's shape and dtype onto devices in another way, such as in parts.

    Returns:
      Nested dicts of `jax.Array`.

    Raises:
      CheckpointError: weights are missing, unknown, duplicated, of the wrong shape or cannot be cast.
    """
    wanted = flatten(targets)
    seen: set[Path] = set()

    def placed_one(path: Path, leaf: np.ndarray | Callable[[], np.ndarray]) -> tuple[Path, jax.Array]:
        array = leaf() if callable(leaf) else leaf
        name, target = "/".join(path), wanted[path]
        if array.shape != tuple(target.shape):
            raise CheckpointError(f"the weight {name} is {list(array.shape)}, expected {list(target.shape)}")
        array = cast(array, target.dtype, name)
        return path, _put(array, getattr(target, "sharding", None)) if put is None else put(path, array)

    def jobs() -> Iterator[Callable[[], tuple[Path, jax.Array]]]:
        for path, leaf in leaves:
            if path not in wanted or path in seen:
                name = "/".join(path)
                raise CheckpointError(f"the weight {name} is {'duplicated' if path in seen else 'not in the model'}")
            seen.add(path)
            yield functools.partial(placed_one, path, leaf)
            del leaf  # before the next one is read

    placed: dict[Path, jax.Array] = {}
    with (progress or silent)("loading weights", sum(map(_bytes, wanted.values()))) as advance:
        for path, array in _in_threads(jobs(), 1 if jax.default_backend() == "cpu" else _WORKERS):
            placed[path] = array
            advance(_bytes(wanted[path]))
    missing = sorted("/".join(path) for path in wanted.keys() - placed.keys())
    if missing:
        raise CheckpointError(f"weights are missing: {names(missing)}; convert the checkpoint again")
    params: Params = jax.tree_util.tree_map_with_path(lambda path, _: placed[_names(path)], targets)
    return params


def _in_threads(jobs: Iterator[Callable[[], _Result]], workers: int) -> Iterator[_Result]:
    """Yields results as they become ready. A job is taken only when a worker is free.

    (In the order of the jobs, one large weight among small ones would leave the other workers idle.)
    """
    if workers == 1:
        for job in jobs:
            result = job()
            del job  # and what it holds, before taking the next one
            yield result
        return
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        under_way: set[concurrent.futures.Future[_Result]] = set()
        for job in jobs:
            under_way.add(pool.submit(job))
            if len(under_way) == workers:
                done, under_way = concurrent.futures.wait(under_way, return_when=concurrent.futures.FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in concurrent.futures.as_completed(under_way))


def _bytes(leaf: Any) -> int:
    return int(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize)


def _put(array: np.ndarray, sharding: Any) -> jax.Array:
    if sharding is None and array.ndim == 2 and array.flags.f_contiguous and not array.flags.c_contiguous:
        return _transpose(_put(array.T, None))  # the device does it faster than the host
    if sharding is not None and not sharding.is_fully_addressable:  # several hosts, each with the whole array
        result: jax.Array = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    else:
        result = jax.device_put(array, sharding)
    return owned(result)


def owned(result: jax.Array) -> jax.Array:
    """An array that was just put onto devices, once it is there, with memory of its own."""
    if any(device.platform == "cpu" for device in result.sharding.device_set):  # type: ignore[attr-defined]
        # Here an array may alias host memory, even a checkpoint's file, and all devices may share it (in JAX 0.10 even
        # with may_alias=False). XLA owns what it has computed.
        result = result.copy()
    return jax.block_until_ready(result)  # bounds host memory: nothing is in flight when the next one is read


_transpose = jax.jit(jnp.transpose, donate_argnums=0)


def restore(
    directory: FilePath,
    targets: Mapping[str, Any],
    *,
    progress: Progress | None = None,
    put: Callable[[Path, np.ndarray], jax.Array] | None = None,
) -> Params:
    """Loads a converted directory onto devices.

    Args:
      directory: written by `gptjax.checkpoints.saving.save`.
      targets, progress, put: as for `place`.

    Returns:
      Nested dicts of `jax.Array` with the targets' shapes, dtypes and shardings.

    Raises:
      CheckpointError: the checkpoint's weights do not match the targets (lists all differences), or a piece is missing
        or damaged.
    """
    manifest = checked_manifest(directory, targets)
    return place(readers(directory, manifest), targets, progress=progress, put=put)


def checked_manifest(directory: FilePath, targets: Mapping[str, Any]) -> Manifest:
    """The manifest of a converted directory. Raises `CheckpointError` if its weights do not match the targets."""
    manifest, wanted = read_manifest(directory), flatten(targets)
    found = {leaf.path: leaf for leaf in manifest.leaves}
    faults = [f"{'/'.join(path)} is missing" for path in wanted.keys() - found.keys()]
    for path, leaf in found.items():
        name = "/".join(path)
        if path not in wanted:
            faults.append(f"{name} is not a weight of the model")
            continue
        target = wanted[path]
        if leaf.shape != tuple(target.shape):
            faults.append(f"{name} is {list(leaf.shape)}, expected {list(target.shape)}")
        floating = [jnp.issubdtype(np.dtype(dtype), jnp.floating) for dtype in (leaf.dtype, target.dtype)]
        if leaf.dtype != str(np.dtype(target.dtype)) and not all(floating):
            faults.append(f"{name} is {leaf.dtype}, expected {np.dtype(target.dtype)}")
    if len(found) != len(manifest.leaves):
        faults.append("a weight is listed twice")
    if faults:
        raise CheckpointError(
            f"the weights in {directory} do not match the model that its config.json describes; convert the "
            "checkpoint again:\n" + listed(sorted(faults))
        )
    return manifest


def readers(directory: FilePath, manifest: Manifest) -> Iterator[tuple[Path, Callable[[], np.ndarray]]]:
    """Yields each weight's path and a function that reads it. Both raise `CheckpointError`."""
    buffers = Buffers()
    for piece, files in manifest.pieces.items():
        path = directory / "params" / piece
        check_piece(path, files)
        for leaf in manifest.leaves:
            if leaf.piece == piece:
                yield leaf.path, functools.partial(read_leaf, path, leaf, buffers)
