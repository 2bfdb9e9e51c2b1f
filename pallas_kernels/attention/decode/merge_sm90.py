"""How partial results of a softmax are merged: everywhere by the same float32 operations. For Hopper, in PTX.

Each is an instruction of its own: MLIR's `mulf` and `addf` may become one `fma` in one place, and two instructions in
another.
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import NamedTuple

from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx
from pallas_kernels.attention.decode.split import FLOOR, LOG2_E
from pallas_kernels.ptx import Value


class Partial(NamedTuple):
    """Of a query, over some places. Over none it is empty."""

    maximum: Value  # of the scores, as logarithms to base 2; at least FLOOR
    total: Value  # of the weights 2^(score - maximum)
    sums: list[Value]  # of weights times values, of some columns

    @classmethod
    def of(cls, numbers: Sequence[Value]) -> "Partial":
        """From a list that begins with the maximum and the total."""
        maximum, total, *sums = numbers
        return cls(maximum, total, sums)

    @classmethod
    def empty(cls, columns: int) -> "Partial":
        """Merging with it changes no bit, except that it makes -0 of a sum 0."""
        zero = ptx.float32(0.0)
        return cls(ptx.float32(FLOOR), zero, [zero] * columns)

    def numbers(self) -> list[Value]:
        """See `of`."""
        return [self.maximum, self.total, *self.sums]


def shares(first: Value, second: Value) -> tuple[Value, Value, Value]:
    """The maximum of two, and the factors for what is relative to each of them."""
    maximum = arith.maximumf(first, second)
    return maximum, ptx.exp2(arith.subf(first, maximum)), ptx.exp2(arith.subf(second, maximum))


def mixed(x: Value, of_x: Value, y: Value, of_y: Value) -> Value:
    """x · of_x, rounded, + y · of_y."""
    return ptx.fma(y, of_y, ptx.rounded_product(x, of_x))


def merge(first: Partial, second: Partial) -> Partial:
    """Both; the order matters."""
    maximum, *factors = shares(first.maximum, second.maximum)

    def both(x: Value, y: Value) -> Value:
        return mixed(x, factors[0], y, factors[1])

    sums = [both(x, y) for x, y in zip(first.sums, second.sums, strict=True)]
    return Partial(maximum, both(first.total, second.total), sums)


def chain(partials: Sequence[Partial]) -> Partial:
    """One after the other."""
    return reduce(merge, partials)


def tree(partial: Callable[[int], Partial], count: int, first: int = 0) -> Partial:
    """Of `count`, a power of two, from number `first` on: neighbours in pairs, then these likewise."""
    if count == 1:
        return partial(first)
    half = count // 2
    return merge(tree(partial, half, first), tree(partial, half, first + half))


def finished(partial: Partial, sink: Value | None) -> list[Value]:
    """The query's result, with its sink (as a logarithm to base 2) if it has one."""
    total, sums = partial.total, partial.sums
    if sink is not None:
        _, of_places, of_sink = shares(partial.maximum, sink)
        total = ptx.fma(total, of_places, of_sink)
        sums = [ptx.rounded_product(value, of_places) for value in sums]
    # Without places and sinks the sum is 0, and so is the result.
    total = arith.maximumf(total, ptx.float32(math.ldexp(1.0, -126)))
    # Adding 0 makes -0 0, as merging with something empty does.
    return [ptx.divide(ptx.rounded_sum(value, ptx.float32(0.0)), total) for value in sums]


def load_sink(sinks: Value, dtype: str, query: Value) -> Value:
    """A query's sink, of bfloat16 or float32, as a logarithm to base 2."""
    text, size = ("ld.global.nc.u16 $0, [$1];", 2) if dtype == "bfloat16" else ("ld.global.nc.b32 $0, [$1];", 4)
    (bits,) = ptx.asm(text, [ptx.i32()], [ptx.offset(sinks, query, size)], volatile=True)
    sink = arith.bitcast(ptx.f32(), arith.shli(bits, ptx.const(16)) if size == 2 else bits)
    return arith.maximumf(ptx.rounded_product(sink, ptx.float32(LOG2_E)), ptx.float32(FLOOR))
