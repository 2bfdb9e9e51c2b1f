"""How much memory a model needs, computed from its declared shapes, and what to do if that is too much.

Finding out allocates nothing. On a mesh, all figures are of one device.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from jax.errors import JaxRuntimeError  # by name: a generator may be closed after modules are gone
from jax.sharding import Mesh

from gptjax.engine import steps
from gptjax.engine.activations import activations, weight_bytes
from gptjax.engine.limits import MemoryLimit
from gptjax.engine.pools import default_policy, least_pages, most_pages, pool_bytes, pool_kinds
from gptjax.errors import CapacityError
from gptjax.layers.cache import capacity_of, kinds, pages_of, reach
from gptjax.models import registry
from gptjax.models.registry import Model
from gptjax.scheduling.policy import Policy
from gptjax.support.runtime import DeviceMemory, device_memory, whole_memory
from gptjax.support.units import readable
from pallas_kernels.pages import PAGE

_LEAST_LENGTH = 32  # positions; a shorter `max_length` helps no one


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes needed on the device for given numbers of rows and positions, and what the device has."""

    weights: int
    cache: int  # keys and values with room for all rows at `max_length`, preallocated
    least_cache: int  # the same with room for one: an engine takes what fits, at least this
    logits: int  # of all rows, float32, and as many int32 counts for penalties; for a `State`, its tokens instead
    activations: int  # the most temporary memory of a step: an upper estimate, see `activations`
    loading: int  # what `load` holds in addition to the weights, before the cache exists; 0 except on a CPU
    device: DeviceMemory

    @property
    def total(self) -> int:
        """The peak, with room for all rows."""
        return self.peak(self.cache)

    @property
    def least(self) -> int:
        """The peak, with the smallest cache."""
        return self.peak(self.least_cache)

    def peak(self, cache: int) -> int:
        """The peak, with a cache of this many bytes."""
        return self.weights + max(self.loading, cache + self.logits + self.activations)


def needed(
    model: Model,
    *,
    batch: int,
    max_length: int,
    device: DeviceMemory | None = None,
    policy: Policy | None = None,
    state: bool = False,
) -> Memory:
    """The memory of a model with an engine of `batch` rows while it generates.

    All generations that are open at a time, such as unfinished streams, share one engine: their rows add up.

    Args:
      batch: rows, which a mesh's axis `data` divides.
      policy: the engine's; by default that of a `LanguageModel`.
      state: the memory with a `steps.State` instead, in which each row has its own pages.
    """
    device = memory_of(model) if device is None else device
    cache, least, logits = (_state if state else _slots)(model, batch, max_length, policy)
    weights, largest, _ = weight_bytes(model)
    return Memory(
        weights=weights,
        cache=cache,
        least_cache=least,
        logits=logits,
        activations=activations(model, batch=model.own.rows_of(batch), max_length=max_length, platform=device.platform),
        # On a CPU the device's memory is the host's, in which a weight is cast and then copied (`weights.place`).
        loading=2 * largest if device.platform == "cpu" else 0,
        device=device,
    )


def memory_of(model: Model) -> DeviceMemory:
    """The memory of the device that the model is for; on a mesh, of the one with the least, if they are there."""
    mesh = model.own.mesh
    if mesh is None:
        return device_memory()
    devices = mesh.local_devices if isinstance(mesh, Mesh) else [None]
    found = min((device_memory(device) for device in devices), key=lambda each: each.available)
    if found.platform != "cpu":
        return found
    count = len(devices) if isinstance(mesh, Mesh) else mesh.size
    parts = {name: getattr(found, name) // count for name in ("limit", "in_use", "available")}
    return dataclasses.replace(found, **parts)  # CPUs have the machine's memory together


def as_loaded(
    model: Model, *, batch: int, max_length: int, packed: bool | None = None, device: DeviceMemory | None = None
) -> Model:
    """The model with its weights as they will be in memory.

    Args:
      packed: whether those in a GGUF file's types stay packed. None: they do, except on a CPU that has room for all of
        their numbers, where unpacking them in each step would take several times as long as reading the numbers.
    """
    if not model.config.types or packed:
        return model
    expanded: Model = model.clone(config=dataclasses.replace(model.config, types=()))
    if packed is None:
        device = memory_of(model) if device is None else device
        need = needed(expanded, batch=batch, max_length=max_length, device=device).total
        return expanded if device.platform == "cpu" and need <= device.available else model
    return expanded


@contextlib.contextmanager
def explained(model: Model, *, batch: int, max_length: int, loaded: bool = True, state: bool = False) -> Iterator[None]:
    """Turns an out-of-memory error raised in the body into a `CapacityError` that says what to try.

    A GPU works asynchronously: what the body does not wait for may fail later, when its result is read.

    Args:
      batch, max_length: rows and positions that the body computes.
      loaded: the model's weights are already on the device.
      state: see `needed`.
    """
    before = None if loaded else memory_of(model)  # if loading fails, only some of the weights are there
    try:
        yield
    except (JaxRuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        device = memory_of(model) if before is None else before
        has = device.available + (weight_bytes(model)[0] if loaded else 0)
        sizes: dict[str, Any] = {"batch": batch, "max_length": max_length, "device": device, "state": state}
        message = shortfall(model, has=has, **sizes)
        if message is None:
            need = needed(model, **sizes).least
            message = (
                f"the {device.device} ran out of memory, though {_rows(batch, max_length)} should need only "
                f"{readable(need)}: close other models, unfinished streams and other programs that use it, or try "
                f"fewer tokens at a time, such as max_length={max(max_length // 2, 1)} (--max-length)"
            )
        raise CapacityError(message) from error


def check(model: Model, *, batch: int, max_length: int, limit: MemoryLimit | None = None) -> None:
    """Raises `CapacityError` if the model and an engine do not fit on the default device. Allocates nothing."""
    if limit is not None:
        limit.check(max_length, parts=model.own.rows_parts)
    device = memory_of(model)
    message = shortfall(model, batch=batch, max_length=max_length, has=device.available, device=device, limit=limit)
    if message is not None:
        raise CapacityError(message)


def check_state(model: Model, *, batch: int, max_length: int) -> None:
    """Raises `CapacityError` if a loaded model's `steps.State`, whose size is known exactly, no longer fits.

    Called before allocating it: a GPU's allocator tries for ten seconds a layer before it gives up.
    """
    device, (cache, _, logits) = memory_of(model), _state(model, batch, max_length)
    if cache + logits > device.available:
        has = device.available + weight_bytes(model)[0]
        message = shortfall(model, batch=batch, max_length=max_length, has=has, device=device, state=True)
        raise CapacityError(message or f"{_rows(batch, max_length)} do not fit")


def shortfall(
    model: Model,
    *,
    batch: int,
    max_length: int,
    has: int,
    device: DeviceMemory,
    policy: Policy | None = None,
    state: bool = False,
    limit: MemoryLimit | None = None,
) -> str | None:
    """A message with the memory needed, the memory available and what to try; None if it fits.

    Args:
      has: bytes available for the weights and everything else, including any that the model already holds.
      policy, state: see `needed`. An engine fits if it has room for one row of `max_length` at a time.
      limit: its share of the device is all that may be used.
    """
    need = needed(model, batch=batch, max_length=max_length, device=device, policy=policy, state=state)
    where = f"the {device.device}"
    if limit is not None and limit.share is not None:
        has, where = min(has, int(limit.share * whole_memory(device))), f"{limit.share:g} of {where}"
    if need.least <= has:
        return None
    one = "" if state or batch == 1 else " of 1 row"
    return (
        f"the model with {_rows(batch, max_length)} in {jnp.dtype(model.dtype).name} needs "
        f"{'at least ' if one else ''}{readable(need.least)} (weights {readable(need.weights)}, cache{one} "
        f"{readable(need.least_cache)}, activations {readable(need.activations)}), "
        f"but {where} has {readable(has)} available; "
        f"try {advice(model, batch=batch, max_length=max_length, has=has, device=device, policy=policy, state=state)}"
    )


def advice(
    model: Model,
    *,
    batch: int,
    max_length: int,
    has: int,
    device: DeviceMemory,
    policy: Policy | None = None,
    state: bool = False,
) -> str:
    """The settings with the fewest changes that need at most `has` bytes: dtype, then length, then rows, then both."""
    half: Model = model.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    choices = [(half, False, False), (model, True, False), (model, False, True), (half, True, False)]
    choices += [(half, False, True), (model, True, True), (half, True, True)]
    if jnp.dtype(model.dtype).itemsize < 4:
        choices = [choice for choice in choices if choice[0] is model]

    def total(model: Model, rows: int, length: int) -> int:
        how = None if policy is None else dataclasses.replace(policy, slots=model.own.rows_of(rows))
        return needed(model, batch=rows, max_length=length, device=device, policy=how, state=state).least

    for candidate, shorter, fewer in choices:
        rows, length = (1 if fewer and shorter else batch), max_length
        if shorter:
            length = _largest(lambda n, m=candidate, b=rows: total(m, b, n) <= has, below=max_length)  # type: ignore[misc]
            length -= length % PAGE if length > PAGE else 0  # the cache grows in such steps
        elif fewer:
            rows = _largest(lambda n, m=candidate: total(m, n, max_length) <= has, below=batch)  # type: ignore[misc]
        if rows < 1 or length < min(_LEAST_LENGTH, max_length) or total(candidate, rows, length) > has:
            continue
        changes = ['dtype="bfloat16" (--dtype bfloat16)'] if candidate is half else []
        changes += [f"max_length={length} (--max-length {length})"] if length < max_length else []
        changes += [f"max_batch={rows} (--max-batch {rows})"] if rows < batch else []
        return " with ".join(changes)
    return f"a device with {readable(total(model, batch, max_length))} free, or a smaller model"


def _largest(fits: Callable[[int], bool], *, below: int) -> int:
    """The largest number from 1 to `below` - 1 that fits, or 0. If a number fits, all smaller ones must."""
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _state(model: Model, batch: int, max_length: int, _: Policy | None = None) -> tuple[int, int, int]:
    """Bytes of a `steps.State`'s cache, twice, and of its logits and tokens.

    They are computed rather than traced, since tracing a thousand layers takes seconds.
    """
    batch, windows = model.own.rows_of(batch), reach(model.config.windows, max_length)
    chunk = steps.chunk_of(model)
    pages = sum(1 + batch * pages_of(window, max_length=max_length, chunk=chunk) for window in windows)
    cache = _page(model) * pages + _tables(model, batch, max_length)
    return cache, cache, 4 * batch * (model.config.vocab_size + capacity_of(max_length))


def _slots(model: Model, batch: int, max_length: int, policy: Policy | None) -> tuple[int, int, int]:
    """Bytes of an engine's cache with room for all rows and for one, and of its logits and counts of tokens."""
    each = pool_kinds(model, max_length=max_length, policy=policy or default_policy(model, slots=batch, reuse=True))
    tables = _tables(model, model.own.rows_of(batch), max_length)
    cache, least = (pool_bytes(each, pages) + tables for pages in (most_pages(each), least_pages(each)))
    return cache, least, 8 * model.own.rows_of(batch) * model.config.vocab_size


def _tables(model: Model, batch: int, max_length: int) -> int:
    """Bytes of the tables of pages, and of the lengths."""
    return 4 * batch * (len(kinds(model.config.windows, max_length)) * capacity_of(max_length) // PAGE + 1)


def _page(model: Model) -> int:
    """Bytes of one layer's keys and values in one page."""
    return PAGE * registry.position_bytes(model)


def _rows(batch: int, max_length: int) -> str:
    return f"{batch} row{'s' if batch > 1 else ''} of {max_length} positions"
