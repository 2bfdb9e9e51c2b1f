"""Loops and branches of a thread."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import scf

from pallas_kernels.ptx.values import Condition, Value, as_i1, as_value, asm, const, less

_operations: Any = scf  # its annotations name classes that it has replaced


def when(condition: Condition, body: Callable[[], None]) -> None:
    """Inlines `body` as a branch that is taken if the condition holds."""
    branch = _operations.IfOp(as_i1(condition))
    with ir.InsertionPoint(branch.then_block):
        body()
        scf.yield_([])


def choose(
    condition: Condition,
    types: Sequence[Any],
    body: Callable[[], Sequence[Value]],
    otherwise: Callable[[], Sequence[Value]],
) -> list[Value]:
    """What `body` returns, values of these types, if the condition holds, else what `otherwise` does: two branches."""
    branch = _operations.IfOp(as_i1(condition), list(types), has_else=True)
    for block, each in ((branch.then_block, body), (branch.else_block, otherwise)):
        with ir.InsertionPoint(block):
            scf.yield_(list(each()))
    return list(branch.results)


def repeat(carry: Sequence[Value], body: Callable[[list[Value]], tuple[Sequence[Value], Condition]]) -> list[Value]:
    """`carry, again = body(carry)`, at least once, and for as long as `again` holds."""
    types = [value.type for value in carry]
    operation = _operations.WhileOp(types, list(carry))
    before, after = (region.blocks.append(*types) for region in operation.regions)
    with ir.InsertionPoint(before):
        following, again = body(list(before.arguments))
        _operations.condition(as_i1(again), list(following))
    with ir.InsertionPoint(after):
        scf.yield_(list(after.arguments))
    return list(operation.results)


def keep_loads_before(number: Value) -> None:
    """Keeps earlier loads before this point, even in a loop: ptxas does not move them beyond a branch.

    This one is never taken, if `number` is never the least int32. If it changes from turn to turn, the branch stays in
    the loop.
    """
    when(less(number, 1 - 2**31), _trap)


def _trap() -> None:
    asm("trap;", [], [])


def loop(
    count: Value | int,
    carry: Sequence[Value],
    body: Callable[[Value, list[Value]], Sequence[Value]],
    *,
    start: int = 0,
) -> list[Value]:
    """`carry = body(i, carry)` for i = start … count - 1."""
    if isinstance(count, int) and count == start:
        return list(carry)
    operation = _operations.ForOp(const(start), as_value(count), const(1), list(carry))
    with ir.InsertionPoint(operation.body):
        scf.yield_(list(body(operation.induction_variable, list(operation.inner_iter_args))))
    return list(operation.results)
