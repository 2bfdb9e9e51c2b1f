"""How many pages an engine's pools get."""

import dataclasses
from collections.abc import Callable, Sequence

import jax

from gptjax.engine import free_of_load, steps
from gptjax.layers.cache import kinds, reach, tail_pages
from gptjax.models.registry import Model, position_bytes
from gptjax.scheduling.policy import Policy, Rows

# With an H200, dispatching one step takes the host 0.55 ms for GPT-2 124M and 1.3 ms for gpt-oss-20b (each call passes
# hundreds of arrays), which is more than the device needs to compute it.
_STEPS_PER_DISPATCH = 8
_READERS = 4  # requests in the middle of their prompts


def default_policy(
    model: Model,
    *,
    slots: int,
    steps_per_dispatch: int | None = None,
    chunk: int | None = None,
    reuse: bool = False,
    exact: bool = True,
) -> Policy:
    """The policy of an engine for which none is given: see `Engine`.

    Args:
      slots: of all parts of a mesh's axis `data` together, which divide them; rounded up.
      exact: a request gets the same bits in any company. Otherwise what is alike is shared even if a request would have
        computed it with other rounding.
    """
    if steps_per_dispatch is None:
        steps_per_dispatch = 1 if jax.default_backend() == "cpu" else _STEPS_PER_DISPATCH
    if steps_per_dispatch < 1:
        raise ValueError(f"steps_per_dispatch must be at least 1, found {steps_per_dispatch}")
    chunk = steps.chunk_of(model) if chunk is None else chunk
    shards, slots = model.own.rows_parts, model.own.rows_of(slots)
    if not exact:
        return Policy(slots, chunk, steps_per_dispatch, share_decoded=True, reuse=reuse, shards=shards)
    least, is_free = free_of_load.least_call(model), free_of_load.is_free_of_load(model, rows=slots)
    if is_free and chunk >= least:
        policy = Policy(slots, chunk, steps_per_dispatch, smallest_call=least)
    else:
        rows: Rows = "needed" if is_free else "all"
        policy = Policy.same_bits(slots=slots, chunk=chunk, steps=steps_per_dispatch, rows=rows)
    least_rows = free_of_load.least_rows(model, slots=slots)
    return dataclasses.replace(policy, smallest_rows=least_rows, reuse=reuse, shards=shards)


@dataclasses.dataclass(frozen=True)
class Kind:
    """How many pages the layers of one kind can use on a device, without page 0."""

    window: int | None
    page_bytes: int  # of a page in all of these layers
    least: int  # one request of `max_length`, alone
    enough: int  # as long as the other kinds have pages, nothing waits for one of these
    most: int  # all slots with `max_length` positions each
    spare: int = 0  # of all of these: to copy into


def pool_kinds(model: Model, *, max_length: int, policy: Policy) -> tuple[Kind, ...]:
    """What each kind of layers can use, in the order of `layers.cache.kinds`.

    A layer without a window needs a page for each `policy.page` positions of each request. A layer with a window W
    needs those that W positions and one call touch: many while a prompt is read in chunks, few while tokens are drawn.
    A call reads one chunk, so few requests are in the middle of their prompts at a time: enough is what all slots need
    to draw, and 4 of them to read. To go on from earlier prompts, as many more windows are kept as there are slots; and
    if these may end inside a page, which is then copied, there is one more page, even if one request fills the others.
    """
    config = model.config
    layer_bytes = policy.page * position_bytes(model)
    layers, slots, whole = reach(config.windows, max_length), policy.slots, policy.pages(max_length)
    copied = 1 if policy.reuse and policy.chunk_multiple % policy.page else 0
    found = []
    for window in kinds(config.windows, max_length):
        least, enough, most = whole, slots * whole, slots * whole
        if window is not None:
            least = min(whole, policy.pages_across(window - 1 + max(policy.chunk + 1, policy.steps)))
            drawing = min(whole, policy.pages_across(window - 1 + policy.steps))
            kept = tail_pages(window) if policy.reuse else 0
            most = slots * (least + kept)
            enough = min(most, slots * (drawing + kept) + _READERS * (least - drawing))
        page_bytes = layers.count(window) * layer_bytes
        found.append(Kind(window, page_bytes, least + copied, enough + copied, most + copied, copied))
    return tuple(found)


def pool_bytes(each: Sequence[Kind], pages: Sequence[int]) -> int:
    """Bytes of pools.

    Args:
      pages: of each kind, with page 0.
    """
    return sum(kind.page_bytes * count for kind, count in zip(each, pages, strict=True))


def pool_tokens(each: Sequence[Kind], pages: Sequence[int], *, page: int) -> int:
    """The positions that all requests together can hold: what the layers without a window have room for.

    Without such layers, that is any number. Then these are the positions that those with windows hold.
    """
    used = [count - 1 - kind.spare for kind, count in zip(each, pages, strict=True)]
    return page * min([count for kind, count in zip(each, used, strict=True) if kind.window is None] or used)


def least_pages(each: Sequence[Kind]) -> tuple[int, ...]:
    """The pages, with page 0, that one request of `max_length` needs alone."""
    return tuple(1 + kind.least for kind in each)


def most_pages(each: Sequence[Kind]) -> tuple[int, ...]:
    """The pages, with page 0, that all slots can use."""
    return tuple(1 + kind.most for kind in each)


def pages_in(each: Sequence[Kind], room: int) -> tuple[int, ...]:
    """Divides bytes among pools: at least `least_pages`, at most `most_pages`.

    All kinds get the same number of pages, but those with a window at most what is `enough` for them. So they never run
    out first: a request never holds more pages of a layer with a window than of one that sees everything (for each
    block of positions, at most one of each), nor does the tree of prefixes. And beyond `enough`, more would only delay
    the eviction of earlier prompts' windows. If all layers without a window have what they can use, the rest goes to
    the others. Only if there is hardly more room than for one request of `max_length`, layers with a window have fewer.

    Args:
      room: bytes.

    Returns:
      The pages of each kind's pool, with page 0.
    """

    def divided(pages: int) -> tuple[int, ...]:
        return tuple(1 + max(kind.least, min(pages, kind.enough)) for kind in each)

    def topped(pages: int) -> tuple[int, ...]:
        return tuple(max(count, 1 + min(pages, kind.most)) for kind, count in zip(each, divided(most), strict=True))

    most = max(kind.most for kind in each)
    pages = _largest(lambda pages: pool_bytes(each, divided(pages)) <= room, most)
    if pages < most:
        return divided(pages)
    return topped(_largest(lambda pages: pool_bytes(each, topped(pages)) <= room, most))


def pages_for(each: Sequence[Kind], tokens: int, *, page: int) -> tuple[int, ...]:
    """The pages, with page 0, for a number of positions in layers without a window, and for as many in the others, up
    to what these can use."""
    pages = [-(-tokens // page) + kind.spare for kind in each]
    return tuple(
        1 + (count if kind.window is None else max(kind.least, min(count, kind.most)))
        for kind, count in zip(each, pages, strict=True)
    )


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 0 to `most` that fits, or 0 if none does. If a number fits, all smaller ones must."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
