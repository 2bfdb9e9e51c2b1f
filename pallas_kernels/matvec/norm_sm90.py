"""The norm of the row that a product multiplies, computed in each of its blocks: for `row_sm90`.

A thread has eight adjacent numbers of the row in each of up to three rounds. They are added and rounded as in
`add_norm.mosaic_sm90`, where a thread has four: the sum and the norm have the same bits.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.matvec.row_norm import RowNorm
from pallas_kernels.matvec.strips_sm90 import equal, lane_of
from pallas_kernels.partial_sum import PartialSum
from pallas_kernels.ptx import Condition, Value
from pallas_kernels.ptx.rows import LARGEST_WIDTH, STRIP

_EIGHT: Final = 8  # numbers of a thread in a round
_MOST_ROUNDS: Final = 3  # their numbers are in registers beside the first weights
_FLOATS: Final = (jnp.bfloat16, jnp.float32)


def takes(norm: RowNorm, threads: int) -> bool:
    """Whether blocks of this many threads can compute the norm."""
    T, D = norm.normed.shape
    return (
        T == 1
        and norm.x.dtype == jnp.bfloat16
        and D % (2 * STRIP) == 0
        and min(LARGEST_WIDTH, _MOST_ROUNDS * _EIGHT * threads) >= D
        and norm.scale_D.dtype in _FLOATS
        and (norm.terms is None or _takes_terms(norm.terms, D))
    )


def _takes_terms(terms: PartialSum, width: int) -> bool:
    """One term, in one part, and a bias at most; nothing on other devices."""
    return (
        not terms.over
        and terms.parts_JAO.shape == (1, 1, width)
        and terms.parts_JAO.dtype == jnp.float32
        and all(each is None for each in (terms.rows_TX, terms.weights_TX, terms.bias_rows_TX))
        and (terms.bias_EO is None or terms.bias_EO.dtype in _FLOATS)
    )


def operands(norm: RowNorm) -> dict[str, jax.Array]:
    """What a `BlockNorm` reads, by name; missing operands are left out."""
    named: dict[str, jax.Array | None] = {"x": norm.x, "scale": norm.scale_D}
    if norm.terms is not None:
        named |= {"term_parts": norm.terms.parts_JAO, "term_bias": norm.terms.bias_EO}
    return {name: operand for name, operand in named.items() if operand is not None}


def results(norm: RowNorm) -> dict[str, jax.ShapeDtypeStruct]:
    """What a `BlockNorm` writes: without terms, the sum is x."""
    return {} if norm.terms is None else {"sum": jax.ShapeDtypeStruct(norm.x.shape, norm.x.dtype)}


def shared(norm: RowNorm) -> dict[str, Any]:
    """Shared memory for a `BlockNorm`: the sums of squares of strips."""
    return {"squares": plgpu.SMEM((norm.normed.shape[1] // STRIP,), jnp.float32)}


@dataclasses.dataclass(frozen=True)
class Round:
    """Which eight numbers of a row a thread has, if the row has them. All threads of a warp have some, or none has."""

    number: Value  # the first eight are number 0
    exists: Condition
    in_all: bool  # whether all threads of the block have some

    @classmethod
    def of(cls, width: int, threads: int) -> list["Round"]:
        """Those of a row that is spread over so many threads."""
        eights, found = width // _EIGHT, []
        for begin in range(0, eights, threads):
            number = ptx.add(utils.thread_idx(), begin)
            found.append(cls(number, ptx.less(number, eights), begin + threads <= eights))
        return found

    def at(self, array: Value, size: int) -> Value:
        """Their address in an array in global memory, of numbers of `size` bytes."""
        return ptx.offset(array, self.number, _EIGHT * size)

    def load(self, array: Value, dtype: Any) -> list[Value]:
        """Begins to load them: four words of bfloat16, or eight of float32."""
        at = self.at(array, dtype.itemsize)
        if dtype == jnp.bfloat16:
            return ptx.load(at, [ptx.i32()] * 4, self.exists)
        return [word for shift in (0, 16) for word in ptx.load(at, [ptx.f32()] * 4, self.exists, shift=shift)]

    def pairs(self, make: Callable[[], list[Value]]) -> list[Value]:
        """Four words that warps without numbers do not make."""
        if self.in_all:
            return make()
        return ptx.choose(self.exists, [ptx.i32()] * 4, make, lambda: [ptx.const(0)] * 4)


@dataclasses.dataclass(frozen=True)
class BlockNorm:
    """What a thread of a block does to add to the row and norm it."""

    width: int  # D
    threads: int  # of the block
    epsilon: float
    dtypes: Mapping[str, Any]  # of `operands`

    @classmethod
    def of(cls, norm: RowNorm, threads: int) -> "BlockNorm":
        """For blocks of so many threads."""
        dtypes = {name: operand.dtype for name, operand in operands(norm).items()}
        return cls(norm.normed.shape[1], threads, norm.epsilon, dtypes)

    def load(self, at: Mapping[str, Value]) -> list[dict[str, list[Value]]]:
        """Begins to load the thread's numbers: words of each operand, by round.

        Args:
          at: addresses by the names of `operands`.
        """
        rounds = Round.of(self.width, self.threads)
        return [{name: each.load(at[name], dtype) for name, dtype in self.dtypes.items()} for each in rounds]

    def run(self, loaded: list[dict[str, list[Value]]], at: Mapping[str, Value], group: Value) -> list[list[Value]]:
        """The norm, as pairs of numbers by round. The first block writes the sum.

        Args:
          at: addresses by the names of `results` and `shared`.
          group: the block's number.
        """
        rounds = Round.of(self.width, self.threads)
        added = partial(self._added, at=at, is_first=equal(group, ptx.const(0)))
        pairs = [each.pairs(partial(added, each, words)) for each, words in zip(rounds, loaded, strict=True)]
        ptx.sync_block()
        variance = ptx.fma(self._row_sum(at["squares"]), ptx.float32(1 / self.width), ptx.float32(self.epsilon))
        (factor,) = ptx.asm("rsqrt.approx.f32 $0, $1;", [ptx.f32()], [variance])
        scales = [words["scale"] for words in loaded]
        return [
            each.pairs(partial(_normed, own, scale, factor))
            for each, own, scale in zip(rounds, pairs, scales, strict=True)
        ]

    def _added(
        self, round_: Round, words: dict[str, list[Value]], *, at: Mapping[str, Value], is_first: Value
    ) -> list[Value]:
        """Pairs of x plus terms. Their squares are added to those of the strip."""
        pairs = words["x"]
        if "term_parts" in words:
            added = _floats(words["term_parts"])
            if "term_bias" in words:
                added = [arith.addf(*pair) for pair in zip(added, _floats(words["term_bias"]), strict=True)]
            pairs = _packed([arith.addf(*pair) for pair in zip(_floats(words["x"]), added, strict=True)])
            ptx.store(round_.at(at["sum"], 2), pairs, ptx.both(round_.exists, is_first))
        numbers = _floats(pairs)
        # A strip is half a warp's. `rows.row_sum` adds in a tree of the same shape.
        fours = [_sum_of_squares(numbers[:4]), _sum_of_squares(numbers[4:])]
        for distance in (8, 4, 2, 1):
            fours = [arith.addf(four, ptx.shuffle_xor(four, distance)) for four in fours]
        strip = ptx.shared_offset(at["squares"], arith.shrui(round_.number, ptx.const(4)), 4)
        is_strips_first = equal(arith.andi(round_.number, ptx.const(15)), ptx.const(0))
        ptx.store(strip, [arith.addf(*fours)], ptx.both(round_.exists, is_strips_first), space="shared")
        return pairs

    def _row_sum(self, squares: Value) -> Value:
        """The sum of all strips, in every thread; again in a tree of the shape that `rows.row_sum` has."""
        lane, _, _ = lane_of()
        strips = self.width // STRIP
        per_lane = 1 if strips <= 32 else 2
        exists = ptx.less(ptx.mul(lane, per_lane), strips)
        own = ptx.shared_offset(squares, lane, 4 * per_lane)
        total = ptx.tree_sum(ptx.load(own, [ptx.f32()] * per_lane, exists, space="shared"))
        for distance in (1, 2, 4, 8, 16):
            total = arith.addf(total, ptx.shuffle_xor(total, distance))
        return total


def _normed(pairs: list[Value], scale: list[Value], factor: Value) -> list[Value]:
    numbers = [arith.mulf(number, factor) for number in _floats(pairs)]
    return _packed([arith.mulf(*pair) for pair in zip(numbers, _floats(scale), strict=True)])


def _floats(words: list[Value]) -> list[Value]:
    """Eight numbers that were loaded, as float32."""
    return list(words) if len(words) == _EIGHT else [number for word in words for number in ptx.halves(word)]


def _packed(numbers: list[Value]) -> list[Value]:
    return [ptx.pack(*numbers[i : i + 2]) for i in range(0, len(numbers), 2)]


def _sum_of_squares(numbers: list[Value]) -> Value:
    total = ptx.rounded_product(numbers[0], numbers[0])
    for number in numbers[1:]:
        total = ptx.fma(number, number, total)
    return total
