"""The compiled programs of an executor: from another one that has them, from the disk, where an earlier process left
them, or compiled now.

JAX's own cache on disk spares XLA's work, but a program must be traced and lowered before JAX knows its name. Here the
name is a digest of all that the program depends on, so what is found is run without tracing anything. Weights are
arguments, so executors of different ones share a program, which goes with the last that uses it.

JAX's serialised executables are pickles, so they are read only from files that nobody else can have written.
"""

import dataclasses
import functools
import itertools
import logging
import operator
import pickle
import secrets
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import flax.linen as nn
import jax
from jax.experimental import serialize_executable

from gptjax.engine.flat_params import FlatParams
from gptjax.engine.programs import Slots
from gptjax.sharding import hosts
from gptjax.support import fingerprint, runtime
from gptjax.support.private_files import PrivateFiles

_TRIED = ("cpu", "gpu")  # platforms on which what was kept has been seen to run
_MOST_BYTES = 4 << 30  # on disk, of all models
# Settings of JAX's that are changed for some calls, in a `with`. All of them are in a program's name on disk.
_settings = operator.attrgetter(
    "jax_disable_jit",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
    "jax_enable_x64",
    "jax_debug_nans",
)
_STATIC = (int, nn.Module)  # part of a program. (Numbers that a program takes are NumPy's.)
_SAME = (FlatParams, Slots, nn.Module)  # in all calls
# What XLA has read from JAX's cache on a CPU lacks its code when it is serialised again (seen with JAX 0.10.2, 0.11.2
# and 0.12). An option for GPUs alone, with another value each time, keeps JAX from finding the program in its cache.
_FOR_GPUS = "xla_gpu_kernel_cache_file"
_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_Keep = Callable[[jax.stages.Compiled], None]  # what to do with a program that is ready
_in_use: weakref.WeakValueDictionary[str, jax.stages.Compiled] = weakref.WeakValueDictionary()  # by their names


class Lowered(Protocol):
    """A program that is ready to be compiled, such as a `jax.stages.Lowered`."""

    @property
    def out_info(self) -> Any:
        """The shapes and dtypes of what it returns."""

    def compile(self) -> Any:
        """Compiles it."""


class Executables:
    """Calls programs, always with the same parameters and with slots of the same shapes.

    The first call of a program with arguments of some shapes compiles it, unless it is on disk. If nothing is kept on
    disk, this is left to `jax.jit`. Any thread may call the methods.

    A call takes the host 2 us more than one of `jax.jit`, which must look at the static arguments: 33 instead of 31 us
    with 92 arrays, as gpt2-tales has, and 108 instead of 106 us with 367, as gpt-oss-20b has (JAX 0.12, an AMD Zen 5).
    """

    def __init__(self, params: FlatParams) -> None:
        self._params = params
        self._ready: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self.found: set[str] = set()  # names of what was compiled before
        self.seconds = [0.0, 0.0]  # that tracing and lowering took

    @functools.cached_property
    def _devices(self) -> list[jax.Device]:
        devices = {device for leaf in self._params.leaves for device in leaf.devices()}
        return sorted(devices, key=lambda each: each.id)

    @functools.cached_property
    def _files(self) -> PrivateFiles | None:
        directory = runtime.executables_directory()
        if directory is None or len(self._devices) != 1 or self._devices[0].platform not in _TRIED:
            return None
        if fingerprint.sources_are_current():
            return PrivateFiles(directory, most_bytes=_MOST_BYTES)
        _log.info("compiled programs are neither read nor kept: sources were edited since this process started")
        return None

    @functools.cached_property
    def _are_others(self) -> bool:
        """Whether other processes have some of the devices."""
        return not all(leaf.is_fully_addressable for leaf in self._params.leaves)

    def __call__(self, program: Any, *arguments: Any) -> Any:
        """What the program returns."""
        if self._files is None:
            if self._are_others:
                self._compile_together(program, arguments)
            return program(*arguments)
        key = _key(program, arguments)
        run = self._ready.get(key)
        if run is None:
            without_jit, *_ = _settings(jax.config)
            if without_jit or not hasattr(program, "lower"):
                return program(*arguments)
            self.lower(program, *arguments).compile()
            run = self._ready[key]
        return run(*_dynamic(arguments))

    def lower(self, program: Any, *arguments: Any) -> Lowered:
        """The program. Once it is compiled, it is ready for calls with such arguments."""
        lower = functools.partial(self._lowered, program, arguments)
        if self._files is None:
            return lower()
        (device,) = self._devices
        leaves, tree = jax.tree.flatten((tuple(_dynamic(arguments)), {}))
        static = [repr(each) for each in arguments if isinstance(each, _STATIC)]
        what = [program.__module__, program.__qualname__, *static, str(tree), *map(_described, leaves)]
        what += [device.device_kind, str(device.id)]  # the executable is for this one
        place = _Place(self._files, f"{program.__name__}-{fingerprint.digest(*what)}", tree, device)
        keep = functools.partial(self._keep, _key(program, arguments), place.name)
        if (shared := _in_use.get(place.name)) is not None:
            self.found.add(place.name)
            return _Shared(shared, keep)
        if (found := place.read_head()) is not None:
            self.found.add(place.name)
            return _OnDisk(*found, keep, place, lower)
        return _Traced(lower(), keep, place)

    def _keep(self, key: tuple[Any, ...], name: str, compiled: jax.stages.Compiled) -> None:
        self._ready[key] = _in_use[name] = compiled

    def _lowered(self, program: Any, arguments: Sequence[Any]) -> jax.stages.Lowered:
        times = [time.monotonic()]
        traced = program.trace(*arguments)
        times.append(time.monotonic())
        lowered: jax.stages.Lowered = traced.lower()
        times.append(time.monotonic())
        took = [after - before for before, after in itertools.pairwise(times)]
        self.seconds = [sum(each) for each in zip(self.seconds, took, strict=True)]
        return lowered

    def _compile_together(self, program: Any, arguments: Sequence[Any]) -> None:
        """Compiles a program in all processes before it runs in any: who waits for the others in it gives up early.

        (Gloo does after 30 s. Compiling can take longer in one process than in another.)
        """
        key = _key(program, arguments)
        if key not in self._ready:
            self.lower(program, *arguments).compile()
            hosts.meet()
            self._ready[key] = program

    def forget(self) -> bool:
        """Removes all that was compiled before, as some of it does not run. Returns whether there was anything."""
        names, self.found = self.found, set()
        if self._files is None:
            return False
        for name in names:
            _in_use.pop(name, None)
            self._files.remove(name)
        self._ready.clear()
        return bool(names)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where one program is on disk, or will be: a head with what it returns, then the executable."""

    files: PrivateFiles
    name: str
    arguments: jax.tree_util.PyTreeDef
    device: jax.Device

    def read_head(self) -> tuple[jax.tree_util.PyTreeDef, list[tuple[tuple[int, ...], Any]]] | None:
        """What it returns: the tree, and each leaf's shape and dtype. None if it is not there."""
        head = self.files.head(self.name)
        return None if head is None else self._unless_it_fails("read", lambda: _tree_and_leaves(head))

    def read(self, returned: jax.tree_util.PyTreeDef) -> jax.stages.Compiled | None:
        """The program; None if it is not there."""
        body = self.files.body(self.name)
        if body is None:
            return None
        load, trees, devices = serialize_executable.deserialize_and_load, (self.arguments, returned), [self.device]
        return self._unless_it_fails("read", lambda: load(body, *trees, execution_devices=devices))

    def write(self, compiled: jax.stages.Compiled) -> None:
        """Writes the program."""
        parts = self._unless_it_fails("written", lambda: _parts(compiled, self.arguments))
        if parts is not None:
            self.files.write(self.name, *parts)

    def _unless_it_fails(self, how: str, work: Callable[[], _T]) -> _T | None:
        try:
            return work()
        except Exception as error:  # a pickle may raise anything, and so may XLA
            _log.warning("the program %s cannot be %s: %s: %s", self.name, how, type(error).__name__, error)
            return None


class _Traced:
    """A program that has to be compiled."""

    def __init__(self, lowered: jax.stages.Lowered, keep: _Keep, place: _Place):
        self.out_info = lowered.out_info
        self._lowered, self._keep, self._place = lowered, keep, place

    def compile(self) -> None:
        """Compiles it, and writes it to its place."""
        began = time.monotonic()
        on_cpu = self._place.device.platform == "cpu"
        compiled = self._lowered.compile({_FOR_GPUS: secrets.token_hex(8)} if on_cpu else None)
        self._keep(compiled)
        done = time.monotonic()
        self._place.write(compiled)
        _log.debug(
            "%s was compiled in %.1f s and written in %.1f s", self._place.name, done - began, time.monotonic() - done
        )


class _Shared:
    """A program that another executor has."""

    def __init__(self, compiled: jax.stages.Compiled, keep: _Keep):
        self.out_info = compiled.out_info
        self._compiled, self._keep = compiled, keep

    def compile(self) -> None:
        """There is nothing to do."""
        self._keep(self._compiled)


class _OnDisk:
    """A program that an earlier process compiled."""

    def __init__(
        self,
        returned: jax.tree_util.PyTreeDef,
        leaves: Sequence[tuple[tuple[int, ...], Any]],
        keep: _Keep,
        place: _Place,
        lower: Callable[[], jax.stages.Lowered],
    ):
        self.out_info = returned.unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
        self._returned, self._keep, self._place, self._lower = returned, keep, place, lower

    def compile(self) -> None:
        """Reads it. If it is damaged, compiles and replaces it."""
        began = time.monotonic()
        read = self._place.read(self._returned)
        if read is None:
            _Traced(self._lower(), self._keep, self._place).compile()
        else:
            self._keep(read)
            _log.debug("%s was read in %.2f s", self._place.name, time.monotonic() - began)


def _parts(compiled: jax.stages.Compiled, arguments: jax.tree_util.PyTreeDef) -> tuple[bytes, bytes]:
    """A head and a body."""
    body, found, returned = serialize_executable.serialize(compiled)
    if found != arguments:
        raise ValueError(f"it takes {found}, not {arguments}")
    # Trees of our own classes cannot be pickled with all versions of JAX, but what they are of can.
    template = returned.unflatten(range(returned.num_leaves))
    leaves = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(compiled.out_info)]
    return pickle.dumps((template, leaves)), body


def _tree_and_leaves(head: bytes) -> tuple[jax.tree_util.PyTreeDef, list[tuple[tuple[int, ...], Any]]]:
    template, leaves = pickle.loads(head)
    return jax.tree.structure(template), leaves


def _dynamic(arguments: Sequence[Any]) -> list[Any]:
    """What the compiled program takes."""
    return [each for each in arguments if not isinstance(each, _STATIC)]


def _key(program: Any, arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Distinguishes the programs of one `Executables`."""
    leaves, tree = jax.tree.flatten([each for each in arguments if not isinstance(each, _SAME)])
    return (program, tree, _settings(jax.config), *[getattr(leaf, "shape", leaf) for leaf in leaves])


def _described(leaf: Any) -> str:
    return f"{leaf.shape} {leaf.dtype} {getattr(leaf, 'weak_type', False)}"
