"""Attention over pages with one query token per row, for Hopper: Pallas Mosaic GPU. See ../RECORD.md.

A warp streams its tiles of one key/value head from memory to registers (`warp_sm90`). Nothing waits until the end, when
the warps of a block, and then the blocks of a cluster, merge their results (`gather_sm90`). In which order, and who
computes what, is in `plan_sm90`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.attention.decode import combine_sm90, gather_sm90, merge_sm90, plan_sm90, warp_sm90
from pallas_kernels.attention.decode.gather_sm90 import Block, Float4
from pallas_kernels.attention.decode.merge_sm90 import Partial
from pallas_kernels.attention.decode.newest_sm90 import Newest
from pallas_kernels.attention.decode.plan_sm90 import FEW_WARPS, MANY_WARPS, QUERIES, DecodePlan, ProductPlan
from pallas_kernels.attention.decode.slots_sm90 import Slots
from pallas_kernels.attention.decode.turns_sm90 import Run, Seen, Share, Thread
from pallas_kernels.fp8_pages import Fp8Pages, Pages, arrays_of, pages_of
from pallas_kernels.pages import PAGE
from pallas_kernels.partial_sum import PartialSum
from pallas_kernels.ptx import Value

plgpu: Any = mosaic_gpu  # JAX 0.10 has another interface: there, this module can only be imported
WIDTHS = 64  # head widths are multiples of this
_TILES = (16, 32, 64, 128)  # places that a warp computes at a time: parts of a page
_WARP_TILES = {64: 32}  # by width; RECORD.md has others
_WARP_TILE = 16


def warp_tile(width: int) -> int:
    """Places that a warp computes at a time by default, for a head width."""
    return _WARP_TILES.get(width, _WARP_TILE)


class NewTokens(NamedTuple):
    """A token for each row, whose queries, key and value are still a product. See `api.append_and_attend`."""

    qkv: PartialSum
    rotation: tuple[jax.Array, jax.Array] | None  # cos and sin
    slots_B: jax.Array  # see `pages.slots`; nothing is written if negative
    scales: tuple[jax.Array, jax.Array] | None = None  # of the norms of queries and keys
    epsilon: float = 0.0  # of the norms


def decode(
    q_BNH: jax.Array,
    k_YKSH: Pages,
    v_YKSH: Pages,
    counts_B: jax.Array,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    table_BZ: jax.Array,
    starts_B: jax.Array | None = None,
    window: int | None = None,
    splits: int | None = None,
    blocks: int | None = None,
    warps: int | None = None,
    warp_tile: int | None = None,
) -> jax.Array:
    """Softmax attention of each row's one query over the first `counts` places of its pages.

    Scores, softmax and sums are float32; the weights are rounded to bfloat16 for their product with the values. Places
    beyond a row's count have no influence, even if they hold NaN. The bits of a row depend on its own query, keys,
    values, count, start and sinks, on G, H, the scale and the tile only: neither on other rows or their number, nor on
    the number of pages or where these lie, nor on splits, blocks and warps.

    Args:
      q_BNH: bfloat16; query n uses key/value head n // (N / K).
      k_YKSH, v_YKSH: bfloat16 or `Fp8Pages`, in pages, S = `pages.PAGE`; H a multiple of 64. Both give the same bits if
        they stand for the same numbers.
      counts_B: int32, 0 to Z · S: places in use.
      sinks_N: bfloat16 or float32, one logit per query head that takes its share of the softmax and has no value.
      scale: scores are multiplied by it.
      table_BZ: int32, each row's pages.
      starts_B: int32, each row's first place that is seen, less than a page; None for 0.
      window: how many places a row sees at most, with `starts_B`.
      splits: clusters that share a row's pages; by default from B, K and Z.
      blocks: per cluster: 1, 2, 4 or 8; by default from B, K and Z.
      warps: per block: 4 or 8; by default from B, K and the window.
      warp_tile: places that a warp computes at a time: 16, 32, 64 or 128; by default from H.

    Returns:
      [B, N, H] bfloat16; 0 for a row whose count is 0.

    Raises:
      ValueError: dtypes, widths or settings that the kernel does not support.
    """
    plan = _planned(q_BNH, k_YKSH, v_YKSH, sinks_N, table_BZ, starts_B, window, scale=scale, warp_tile=warp_tile)
    plan = _dealt(plan, len(q_BNH), splits, blocks, warps)
    return _decode({"q": q_BNH}, k_YKSH, v_YKSH, counts_B, sinks_N, table_BZ, starts_B, plan=plan)[0]


def decode_newest(
    tokens: NewTokens,
    k_YKSH: Pages,
    v_YKSH: Pages,
    counts_B: jax.Array,
    sinks_N: jax.Array | None = None,
    *,
    scale: float,
    table_BZ: jax.Array,
    starts_B: jax.Array | None = None,
    window: int | None = None,
    splits: int | None = None,
    blocks: int | None = None,
    warps: int | None = None,
) -> tuple[jax.Array, Pages, Pages]:
    """`decode` for the rows' newest tokens, whose keys and values it also writes to the pages.

    A row's newest token has the last of its `counts` places, which is the place of its slot. The same bits as those of
    `decode` after these steps by themselves.

    Returns:
      The result, and the pages, which are updated in place if donated.
    """
    B, H = len(tokens.slots_B), k_YKSH.shape[3]
    q_BNH = jax.ShapeDtypeStruct((B, tokens.qkv.parts_JAO.shape[2] // H - 2 * k_YKSH.shape[1], H), jnp.bfloat16)
    plan = _planned(q_BNH, k_YKSH, v_YKSH, sinks_N, table_BZ, starts_B, window, scale=scale)
    (cos, sin), (q_scale, k_scale) = (each or (None, None) for each in (tokens.rotation, tokens.scales))
    bias = tokens.qkv.bias_EO
    product = ProductPlan(
        rows=B,
        pieces=len(tokens.qkv.parts_JAO),
        has_bias=bias is not None,
        rotates=cos is not None,
        scales=None if q_scale is None else q_scale.dtype,
        epsilon=tokens.epsilon,
    )
    plan = _dealt(dataclasses.replace(plan, product=product), B, splits, blocks, warps)
    given = {"parts": tokens.qkv.parts_JAO, "bias": None if bias is None else bias.astype(jnp.bfloat16), "cos": cos}
    given |= {"sin": sin, "q_scale": q_scale, "k_scale": k_scale, "slots": tokens.slots_B}
    out, *pools = _decode(given, k_YKSH, v_YKSH, counts_B, sinks_N, table_BZ, starts_B, plan=plan)
    return out, pools[0], pools[1]


def _planned(
    q_BNH: jax.Array | jax.ShapeDtypeStruct,
    k_YKSH: Pages,
    v_YKSH: Pages,
    sinks_N: jax.Array | None,
    table_BZ: jax.Array,
    starts_B: jax.Array | None,
    window: int | None,
    *,
    scale: float,
    warp_tile: int | None = None,
) -> DecodePlan:
    """What follows from the operands, without who computes what."""
    N, H = q_BNH.shape[1:]
    K, Z = k_YKSH.shape[1], table_BZ.shape[1]
    dtypes = {x.dtype for x in (q_BNH, k_YKSH, v_YKSH) if not isinstance(x, Fp8Pages)}
    if dtypes != {jnp.dtype(jnp.bfloat16)}:
        raise ValueError(f"mosaic decode attention takes bfloat16, found {', '.join(sorted(map(str, dtypes)))}")
    if sinks_N is not None and sinks_N.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"mosaic decode attention takes sinks of bfloat16 or float32, found {sinks_N.dtype}")
    if H % WIDTHS:
        raise ValueError(f"mosaic decode attention takes head widths that are multiples of {WIDTHS}, found {H}")
    if N % K:
        raise ValueError(f"{N} query heads cannot share {K} key/value heads: not a multiple")
    warp_tile = _WARP_TILES.get(H, _WARP_TILE) if warp_tile is None else warp_tile
    if warp_tile not in _TILES:
        raise ValueError(f"a warp's tile has 16, 32, 64 or 128 places, found {warp_tile}")
    is_folded = starts_B is not None and window is not None and window <= PAGE
    return DecodePlan(
        keys=K,
        group=N // K,
        width=H,
        places=PAGE if is_folded else PAGE * Z,
        warp_tile=warp_tile,
        scale=scale,
        sinks=None if sinks_N is None else sinks_N.dtype.name,
        pages=Z,
        windowed=starts_B is not None,
        folded=is_folded,
        fp8=isinstance(k_YKSH, Fp8Pages),
    )


def _dealt(plan: DecodePlan, rows: int, splits: int | None, blocks: int | None, warps: int | None) -> DecodePlan:
    """The plan, with the work of these rows divided as asked, or else by default."""
    if blocks not in (None, 1, 2, 4, 8):
        raise ValueError(f"a cluster has 1, 2, 4 or 8 blocks, found {blocks}")
    if warps not in (None, FEW_WARPS, MANY_WARPS):
        raise ValueError(f"a block has {FEW_WARPS} or {MANY_WARPS} warps, found {warps}")
    plan = plan_sm90.deal(plan, rows * plan.keys)
    plan = dataclasses.replace(
        plan, splits=splits or plan.splits, blocks=blocks or plan.blocks, warps=warps or plan.warps
    )
    if not plan.fits:
        raise ValueError(
            f"blocks of {plan.warps} warps, {plan.blocks} a cluster, have no room for their results: H={plan.width}"
        )
    if plan.loops and plan.blocks > 1:
        raise ValueError(f"{plan.ranges} ranges of {plan_sm90.RANGE} places need {plan.ranges} splits, or 1 block")
    return plan


@functools.partial(jax.jit, static_argnames="plan")
def _decode(
    given: dict[str, jax.Array | None],
    k_YKSH: Pages,
    v_YKSH: Pages,
    counts_B: jax.Array,
    sinks_N: jax.Array | None,
    table_BZ: jax.Array,
    starts_B: jax.Array | None,
    *,
    plan: DecodePlan,
) -> list[Any]:
    """The result and, if they are written to, the pages. `given`: the queries, or what they come from, by name."""
    B, K, G, H, J = len(counts_B), plan.keys, plan.group, plan.width, plan.entries
    pools: dict[str, Any] = arrays_of(k_YKSH, v_YKSH)
    if plan.product is not None:
        pools = {name: jax.new_ref(pool) for name, pool in pools.items()}
    of_rows = {"counts": counts_B, "starts": starts_B, "slots": given.pop("slots", None)}
    operands = given | pools | {"sinks": sinks_N}
    (operands if starts_B is None else of_rows)["table"] = table_BZ  # of a window, XLA gathers it
    operands["numbers"], begins = _joined(of_rows)
    operands["angles"], of_angles = _joined({name: operands.pop(name, None) for name in ("cos", "sin")})
    within = {"numbers": begins, "angles": of_angles}
    # What is missing is not read, but something has to be passed for it.
    operands = {name: counts_B if each is None else each for name, each in operands.items()}
    shapes = {"out": jax.ShapeDtypeStruct((B, K * G, H), jnp.bfloat16)}
    if plan.splits > 1:
        shapes = {
            "out": jax.ShapeDtypeStruct((B, K, J, G, H), jnp.float32),
            "totals": jax.ShapeDtypeStruct((B, K, J, G, 2), jnp.float32),
        }
    shared = {
        "memory": plgpu.SMEM((plan.most_slots * plan.slot_bytes // 4,), jnp.float32),
        "mailbox": plgpu.SMEM((6 * plan.float4s if plan.blocks > 1 else 4,), jnp.float32),
        "mbarrier": plgpu.SMEM((4,), jnp.float32),
    }
    if plan.product is not None:
        shared["heads"] = plgpu.SMEM((Newest.words(plan),), jnp.float32)
    results = ptx.launch(
        functools.partial(decode_attention, plan, within),
        operands,
        shapes,
        {"row": B, "head": K, "queries": -(-G // QUERIES), "split": plan.splits},
        shared,
        cluster=plan.blocks,
        warpgroups=None if plan.warps == FEW_WARPS else plan.warps // 4,
    )
    out = results["out"]
    if plan.splits > 1:
        out = combine_sm90.combine(plan, out, results["totals"], counts_B, sinks_N)
    if plan.product is None:
        return [out]
    return [out, *pages_of({name: jax.freeze(pool) for name, pool in pools.items()})]


def _joined(arrays: dict[str, jax.Array | None]) -> tuple[jax.Array | None, dict[str, int]]:
    """Arrays one after another, and where each begins: XLA computes them in one kernel instead of one each."""
    there = {name: array.reshape(-1) for name, array in arrays.items() if array is not None}
    begins = itertools.accumulate((array.size for array in there.values()), initial=0)
    whole = jnp.concatenate(list(there.values())) if there else None
    return whole, dict(zip(there, begins, strict=False))


def decode_attention(
    plan: DecodePlan,
    within: Mapping[str, Mapping[str, int]],
    *,
    out: Value,
    row: Value,
    head: Value,
    queries: Value,
    split: Value,
    totals: Value | None = None,
    **arrays: Value,
) -> None:
    """One thread of a block: up to 16 queries of a group, and the cluster's share of the places.

    Args:
      within: of arrays that are several, where each begins: see `_joined`.
    """
    for whole, begins in within.items():
        arrays |= {name: ptx.shifted(arrays[whole], 4 * begin) for name, begin in begins.items()}
    block = Block(row, head, ptx.mul(queries, QUERIES), split, ptx.cluster_rank(plan.blocks))
    thread = utils.thread_idx()
    at = Thread(block, arith.shrui(thread, ptx.const(5)), arith.andi(thread, ptx.const(31)))
    seen = Seen.of(plan, arrays["counts"], arrays.get("starts"), row)
    entry = ptx.const(0) if plan.splits == 1 else split
    if not plan.loops:
        for four, partial in _shared(plan, arrays, at, seen, entry):
            _write(plan, out, totals, block, entry, four, partial)
        return
    fours = gather_sm90.float4s(plan, arrays["sinks"], block)

    def turn(carry: list[Value]) -> tuple[list[Value], Value]:
        entry, *numbers = carry
        partials = [each for _, each in _shared(plan, arrays, at, seen, entry, fours)]
        if plan.splits == 1:
            before = [Partial.of(numbers[6 * i : 6 * i + 6]) for i in range(len(fours))]
            numbers = [x for pair in zip(before, partials, strict=True) for x in merge_sm90.merge(*pair).numbers()]
        else:
            for four, each in zip(fours, partials, strict=True):
                _write(plan, out, totals, block, entry, four, each)
        ptx.sync_block()  # the slots are used again
        following = ptx.add(entry, plan.splits)
        return [following, *numbers], ptx.less(following, seen.ranges(plan))

    empty = [x for _ in fours for x in Partial.empty(4).numbers()] if plan.splits == 1 else []
    _, *numbers = ptx.repeat([entry, *empty], turn)
    if plan.splits == 1:
        for i, four in enumerate(fours):
            _write(plan, out, totals, block, entry, four, Partial.of(numbers[6 * i : 6 * i + 6]))


def _shared(
    plan: DecodePlan,
    arrays: dict[str, Value],
    at: Thread,
    seen: Seen,
    entry: Value,
    fours: list[Float4] | None = None,
) -> list[tuple[Float4, Partial]]:
    """The float4s that the thread writes, and their partial results over the cluster's share of the row.

    All first loads begin before anything waits but for the table's first entries; with a single split, they do not even
    wait for the count.
    """
    block, slots = at.block, Slots(plan, arrays["memory"])
    share = Share.whole(entry) if plan.splits == 1 else Share.of(plan, seen, entry)
    if plan.ranges > 1:
        seen = seen.within(share.range)
    stream = warp_sm90.CacheStream(plan, arrays, arrays["table"], at, Run.of(plan, share, at), seen)
    pages = stream.pages()
    newest = None if plan.product is None else Newest.of(plan, plan.product, arrays, at)
    a = warp_sm90.load_queries(plan, arrays["q"], at) if newest is None else []
    if fours is None:
        fours = gather_sm90.float4s(plan, arrays["sinks"], block)
    loaded = warp_sm90.Loaded.of(stream, pages)
    gather_sm90.prepare(plan, arrays["mbarrier"])  # while the loads are under way
    if plan.clears:
        slots.clear()
    if newest is not None:
        newest.keep(entry)
    if plan.clears or newest is not None:
        ptx.sync_block()
    else:
        ptx.sync_warp()  # keeps ptxas from delaying these loads
    if newest is not None:
        a = warp_sm90.query_factors(plan, newest.query_words)
    warp_sm90.attend(stream, a, loaded, slots, newest)
    exchange = arrays["mailbox"], arrays["mbarrier"]
    return list(zip(fours, gather_sm90.gather(plan, slots, share.shift, *exchange, block, fours), strict=True))


def _write(
    plan: DecodePlan, out: Value, totals: Value | None, block: Block, entry: Value, four: Float4, partial: Partial
) -> None:
    if plan.splits == 1:
        gather_sm90.write(plan, out, block, four, partial)
    else:
        gather_sm90.write_entry(plan, out, totals, block, entry, four, partial)
