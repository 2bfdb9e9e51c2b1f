"""How large the pools of an engine become on a device."""

from collections.abc import Sequence

from gptjax.engine import memory
from gptjax.engine.limits import MemoryLimit
from gptjax.engine.memory import Memory
from gptjax.engine.pools import (
    Kind,
    default_policy,
    most_pages,
    pages_for,
    pages_in,
    pool_bytes,
    pool_kinds,
    pool_tokens,
)
from gptjax.errors import CapacityError
from gptjax.models.registry import Model
from gptjax.scheduling.policy import Policy
from gptjax.support.runtime import DeviceMemory, whole_memory
from gptjax.support.units import readable

# Of a GPU's memory, left for what XLA tries out when it compiles (2.8 GB for gpt-oss-20b) and for fragments.
_SPARE = 0.05


def pools(model: Model, *, max_length: int, policy: Policy, limit: MemoryLimit | None = None) -> tuple[int, ...]:
    """The pages, with page 0, of the pools of an engine for a loaded model: as many as fit, up to what all slots use.

    Without a limit, the pools take what the other needs of the engine leave: on a GPU nearly all that JAX has taken, on
    a CPU at most half of the free memory. In any case they have room for one request of `max_length`.

    Args:
      limit: a share of the device's memory for weights, pools and all else; or the exact size of the pools.

    Raises:
      CapacityError: not even one request of `max_length` fits, or not within the limit; or not that many tokens.
    """
    device = memory.memory_of(model)
    need = memory.needed(model, batch=policy.all_slots, max_length=max_length, device=device, policy=policy)
    short = need.least_cache + need.logits > device.available
    if short or limit is not None:
        message = memory.shortfall(
            model,
            batch=policy.all_slots,
            max_length=max_length,
            has=device.available + need.weights,
            device=device,
            policy=policy,
            limit=limit,
        )
        if short or message is not None:
            raise CapacityError(message or "one row does not fit")
    each = pool_kinds(model, max_length=max_length, policy=policy)
    if limit is None or limit.tokens is None:
        return _pages_in(each, need, device.available, limit)
    limit.check(max_length, parts=policy.shards)
    pages = pages_for(each, model.own.rows_of(limit.tokens), page=policy.page)
    if pool_bytes(each, pages) + need.logits > device.available:
        fits = policy.shards * pool_tokens(each, _pages_in(each, need, device.available, None), page=policy.page)
        raise CapacityError(
            f"a cache of {limit.tokens} tokens needs {readable(pool_bytes(each, pages))}, but the {device.device} has "
            f'{readable(device.available)} available; try memory="{fits}tokens" (--memory {fits}tokens)'
        )
    return pages


def foreseen(
    model: Model, *, batch: int, max_length: int, device: DeviceMemory | None = None, policy: Policy | None = None
) -> tuple[int, int]:
    """The cache of an engine on a device on which the model is not loaded yet: its bytes, and the positions that it has
    room for. If it does not fit, they are those of one row. On a mesh, the bytes are of one device."""
    policy = policy or default_policy(model, slots=batch, reuse=True)
    need = memory.needed(model, batch=batch, max_length=max_length, device=device, policy=policy)
    each = pool_kinds(model, max_length=max_length, policy=policy)
    pages = _pages_in(each, need, need.device.available - need.weights, None)
    tokens = policy.shards * pool_tokens(each, pages, page=policy.page)
    return pool_bytes(each, pages) + _tables(each, need), tokens


def _pages_in(each: Sequence[Kind], need: Memory, available: int, limit: MemoryLimit | None) -> tuple[int, ...]:
    """As many pages as fit into the memory that is left, but no fewer than one row of `max_length` needs."""
    others = _tables(each, need) + need.logits + need.activations
    room = available - others
    if limit is not None and limit.share is not None:
        room = min(room, int(limit.share * whole_memory(need.device)) - need.weights - others)
    elif need.device.platform == "cpu":
        room //= 2
    else:
        room -= int(_SPARE * need.device.limit)
    return pages_in(each, room)


def _tables(each: Sequence[Kind], need: Memory) -> int:
    return need.cache - pool_bytes(each, most_pages(each))
