"""Loops and branches of a thread."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import scf

from pallas_kernels.ptx.values import Condition, Value, as_i1, as_value, const

_operations: Any = scf  # its annotations name classes that it has replaced


def when(condition: Condition, body: Callable[[], None]) -> None:
    """Inlines `body` as a branch that is taken if the condition holds."""
    branch = _operations.IfOp(as_i1(condition))
    with ir.InsertionPoint(branch.then_block):
        body()
        scf.yield_([])


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
