"""A prompt's heads, from their product to where they are used, for Hopper: Pallas Mosaic GPU.

They are summed up, rounded to bfloat16, and rotated; queries go to an array, keys and values to their pages. A warp has
some heads of a token, and a lane two adjacent pairs of a head, so that all it reads and writes is whole sectors of
memory. A token's bits depend on itself alone, and are those of `attention.append_and_attend`.
"""

import dataclasses
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.formats import fp8_sm90
from pallas_kernels.fp8_pages import Fp8Pages, Pages, arrays_of, pages_of
from pallas_kernels.pages import PAGE
from pallas_kernels.partial_sum import PartialSum
from pallas_kernels.ptx import Value

_WIDTHS: Final = 64, 128  # of heads
_WARPS: Final = 4  # of a block
_TURNS: Final = 8  # whose loads a warp has in flight together


@dataclasses.dataclass(frozen=True)
class _HeadsPlan:
    """Everything that is known when the kernel is built."""

    tokens: int
    pieces: int  # of the product
    queries: int  # heads
    keys: int  # heads, and as many of values
    width: int
    has_bias: bool
    rotates: bool
    fp8: bool = False  # the pages

    @property
    def heads(self) -> int:
        return self.queries + 2 * self.keys

    @property
    def lanes(self) -> int:
        """Lanes of a head."""
        return self.width // 4

    @property
    def at_once(self) -> int:
        """Heads of a warp in one turn."""
        return 32 // self.lanes

    @property
    def shares(self) -> int:
        """Warps that share a token's heads."""
        return -(-self.heads // (_TURNS * self.at_once))

    @property
    def row(self) -> int:
        """Bytes of a head in bfloat16."""
        return 2 * self.width


def supports(qkv: PartialSum, k_YKSH: Pages) -> bool:
    """Whether `append_heads` takes these operands."""
    return (
        (isinstance(k_YKSH, Fp8Pages) or k_YKSH.dtype == jnp.bfloat16)
        and k_YKSH.shape[-1] in _WIDTHS
        and qkv.parts_JAO.dtype == jnp.float32
        and qkv.is_plain
        and not qkv.over
    )


@jax.jit
def append_heads(
    qkv: PartialSum,
    rotation: tuple[jax.Array, jax.Array] | None,
    slots_T: jax.Array,
    k_YKSH: Pages,
    v_YKSH: Pages,
) -> tuple[jax.Array, Pages, Pages]:
    """See `api.append_heads`. `supports` must hold for the operands."""
    T, J, columns = len(slots_T), *qkv.parts_JAO.shape[::2]
    K, H = k_YKSH.shape[1], k_YKSH.shape[3]
    bias_EO, cos_sin = qkv.bias_EO, rotation or ()
    is_fp8 = isinstance(k_YKSH, Fp8Pages)
    plan = _HeadsPlan(T, J, columns // H - 2 * K, K, H, bias_EO is not None, bool(cos_sin), is_fp8)
    operands: dict[str, Any] = {"parts": qkv.parts_JAO, "slots": slots_T}
    if bias_EO is not None:
        operands["bias"] = bias_EO.astype(jnp.bfloat16)
    operands |= dict(zip(("cos", "sin"), cos_sin, strict=False))
    pools = {name: jax.new_ref(pool) for name, pool in arrays_of(k_YKSH, v_YKSH).items()}
    out = ptx.launch(
        partial(prompt_heads, plan),
        operands | pools,
        {"out": jax.ShapeDtypeStruct((T, plan.queries, H), jnp.bfloat16)},
        {"block": -(-T * plan.shares // _WARPS)},
    )
    k_YKSH, v_YKSH = pages_of({name: jax.freeze(pool) for name, pool in pools.items()})
    return out["out"], k_YKSH, v_YKSH


def prompt_heads(plan: _HeadsPlan, *, block: Value, **at: Value) -> None:
    """One thread: two pairs of a head in each turn."""
    thread = utils.thread_idx()
    lane, warp = arith.andi(thread, ptx.const(31)), arith.shrui(thread, ptx.const(5))
    token, share = ptx.divided(ptx.add(ptx.mul(block, _WARPS), warp), plan.shares)
    inside = ptx.less(token, plan.tokens)
    (slot,) = ptx.load(ptx.offset(at["slots"], token, 4), [ptx.i32()], inside)
    which, place = ptx.divided(lane, plan.lanes)
    pair = ptx.mul(place, 2)
    angles = _load_angles(plan, at, token, pair, inside) if plan.rotates else []
    heads = [ptx.add(ptx.mul(share, _TURNS * plan.at_once), which, turn * plan.at_once) for turn in range(_TURNS)]
    exist = [ptx.both(inside, ptx.less(head, plan.heads)) for head in heads]
    loaded = [_load(plan, at, token, head, pair, each) for head, each in zip(heads, exist, strict=True)]
    ptx.sync_warp()  # keeps ptxas from delaying loads until they are needed
    for head, terms, each in zip(heads, loaded, exist, strict=True):
        is_query = ptx.less(head, plan.queries)
        kind, key = ptx.divided(ptx.add(head, -plan.queries), plan.keys)  # anything for a query
        words = _finished(terms, angles, is_value=ptx.less(plan.queries + plan.keys - 1, head))
        page, inner = ptx.divided(slot, PAGE)
        row = ptx.add(ptx.mul(ptx.add(ptx.mul(page, plan.keys), key), PAGE), inner)
        to = ptx.offset(at["out"], ptx.add(ptx.mul(token, plan.queries), head), plan.row)
        if plan.fp8:
            is_written, is_rounded = ptx.both(each, is_query), ptx.both(each, ptx.less(plan.queries - 1, head))
            is_rounded = ptx.both(is_rounded, ptx.less(-1, slot))
            _write_rounded(plan, at, words, is_value=ptx.less(0, kind), row=row, place=place, condition=is_rounded)
        else:
            pool = ptx.offset(arith.select(ptx.less(0, kind), at["v"], at["k"]), row, plan.row)
            to = arith.select(is_query, to, pool)
            is_written = ptx.both(each, arith.ori(is_query, ptx.less(-1, slot)))
        for word, more in zip(words, (0, plan.width), strict=True):
            ptx.store(ptx.offset(to, pair, 2), [word], is_written, shift=more)


def _write_rounded(
    plan: _HeadsPlan,
    at: dict[str, Value],
    words: list[Value],
    *,
    is_value: Value,
    row: Value,
    place: Value,
    condition: Value,
) -> None:
    """Writes a key or a value to its row of the pages, in float8."""
    vector = fp8_sm90.Vector.of([number for word in words for number in ptx.halves(word)], plan.lanes)
    numbers, exponents = (arith.select(is_value, at[f"v{name}"], at[f"k{name}"]) for name in ("", "_exponents"))
    first = ptx.offset(ptx.offset(numbers, row, plan.width), place, 2)
    exponent = ptx.offset(exponents, row, 1)
    shifts = 0, plan.width // 2
    vector.store_adjacent(first, shifts, exponent, is_first=ptx.less(place, 1), condition=condition)


def _load_angles(plan: _HeadsPlan, at: dict[str, Value], token: Value, pair: Value, inside: Value) -> list[list[Value]]:
    """Begins to load the cosines and the sines of the lane's pairs."""
    first = ptx.add(ptx.mul(token, plan.width // 2), pair)
    return [ptx.load(ptx.offset(at[name], first, 4), [ptx.f32()] * 2, inside) for name in ("cos", "sin")]


def _load(
    plan: _HeadsPlan, at: dict[str, Value], token: Value, head: Value, pair: Value, exists: Value
) -> list[list[Value]]:
    """Begins to load a lane's four numbers of each term of the sum, the first of each pair first; of a bias, words."""
    columns, half = plan.heads * plan.width, plan.width // 2
    column = ptx.add(ptx.mul(head, plan.width), pair)
    source = ptx.offset(ptx.offset(at["parts"], token, 4 * columns), column, 4)
    terms = []
    for piece in range(plan.pieces):
        shifts = [4 * (plan.tokens * columns * piece + more) for more in (0, half)]
        terms.append([x for shift in shifts for x in ptx.load(source, [ptx.f32()] * 2, exists, shift=shift)])
    if plan.has_bias:
        source = ptx.offset(at["bias"], column, 2)
        terms.append([x for more in (0, 2 * half) for x in ptx.load(source, [ptx.i32()], exists, shift=more)])
    return terms


def _finished(terms: list[list[Value]], angles: list[list[Value]], *, is_value: Value) -> list[Value]:
    """The sums in bfloat16, rotated unless they are of a value: a word of first numbers, and one of last ones."""
    terms = [[x for word in each for x in ptx.halves(word)] if len(each) == 2 else each for each in terms]
    sums = terms[0]
    for each in terms[1:]:
        sums = [ptx.rounded_sum(*both) for both in zip(sums, each, strict=True)]
    words = [ptx.pack(*sums[:2]), ptx.pack(*sums[2:])]
    if not angles:
        return words
    first, last = map(ptx.halves, words)
    pairs = [ptx.rotated(*each) for each in zip(first, last, *angles, strict=True)]
    turned = [ptx.pack(*numbers) for numbers in zip(*pairs, strict=True)]
    return [arith.select(is_value, *both) for both in zip(words, turned, strict=True)]
