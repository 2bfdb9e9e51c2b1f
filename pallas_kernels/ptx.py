"""Instructions of NVIDIA GPUs that Pallas has no name for, for use inside `plgpu.inline_mgpu`: one thread's view."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

Value = Any  # ir.Value: one thread's register


def i32() -> Any:
    """32-bit integers, and whatever else has 32 bits."""
    return ir.IntegerType.get_signless(32)


def i64() -> Any:
    """64-bit integers: addresses."""
    return ir.IntegerType.get_signless(64)


def f32() -> Any:
    """float32."""
    return ir.F32Type.get()


def const(value: float, type_: Any = None) -> Value:
    """A constant, of 32-bit integers unless said otherwise."""
    return utils.c(value, i32() if type_ is None else type_)


def asm(text: str, outputs: Sequence[Any], inputs: Sequence[Value], *, volatile: bool = False) -> list[Value]:
    """Inlines PTX, whose operands are $0, $1, …: the outputs, of the given types, then the inputs.

    Volatile instructions stay in their order. Outputs may be written before all inputs have been read.
    """
    letters = {str(i32()): "r", str(i64()): "l", str(f32()): "f"}
    constraints = [f"=&{letters[str(type_)]}" for type_ in outputs] + [letters[str(value.type)] for value in inputs]
    several = len(outputs) > 1
    void = ir.Type.parse("!llvm.void")
    kind = llvm.StructType.get_literal(list(outputs)) if several else next(iter(outputs), void)
    side_effects = volatile or not outputs
    result: Any = llvm.inline_asm(kind, list(inputs), text, ",".join(constraints), has_side_effects=side_effects)
    if several:
        return [llvm.extractvalue(type_, result, [i]) for i, type_ in enumerate(outputs)]
    return [result] if outputs else []


def add(*values: Value | int) -> Value:
    """A sum of 32-bit integers."""
    return functools.reduce(arith.addi, map(_value, values))


def mul(a: Value | int, b: Value | int) -> Value:
    """A product of 32-bit integers."""
    return arith.muli(_value(a), _value(b))


def less(a: Value | int, b: Value | int) -> Value:
    """1 where a < b, else 0: what inlined code makes a predicate of."""
    return arith.extui(i32(), arith.cmpi(arith.CmpIPredicate.slt, _value(a), _value(b)))


def _value(value: Value | int) -> Value:
    return const(value) if isinstance(value, int) else value


def address(ref: Value) -> Value:
    """Where an array in global memory begins."""
    return llvm.ptrtoint(i64(), utils.memref_ptr(ref))


def offset(base: Value, index: Value | int, size: int) -> Value:
    """The address of an element of `size` bytes."""
    (result,) = asm("mad.wide.s32 $0, $1, $2, $3;", [i64()], [_value(index), const(size), base])
    return result


def thread() -> Value:
    """The thread's number in its warpgroup."""
    return arith.andi(utils.thread_idx(), const(127))


def lane() -> tuple[Value, Value, Value]:
    """The thread's warp in its warpgroup, and g and q of its lane 4·g + q, as tensor cores count."""
    number = arith.andi(thread(), const(31))
    return arith.shrui(thread(), const(5)), arith.shrui(number, const(2)), arith.andi(number, const(3))


def mma(acc: Sequence[Value], a: Sequence[Value], b: Sequence[Value]) -> list[Value]:
    """acc (16 × 8, float32) + a (16 × 16, bfloat16) · b (16 × 8, bfloat16), by a warp.

    Lane 4·g + q holds of acc rows g, g, g + 8, g + 8 at columns 2·q, 2·q + 1, 2·q, 2·q + 1; of a, in pairs along the
    inner axis, rows g, g + 8, g, g + 8 at pairs q, q, q + 4, q + 4; of b column g at pairs q, q + 4.
    """
    return asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        [f32()] * 4,
        [*a, *b, *acc],
    )


@dataclasses.dataclass(frozen=True)
class Meetings:
    """mbarriers in shared memory, at each of which one thread tells how many bytes are going to arrive: `expect`."""

    address: Value  # in shared memory
    count: int
    warps: int = 4  # of the block

    def prepare(self) -> None:
        """Initialises them. Before they are used, all threads must have met."""
        # A warp does so one after the other: so each has some.
        warp, number = (op(utils.thread_idx(), const(32)) for op in (arith.divui, arith.remui))
        number = add(mul(number, self.warps), warp)
        own = offset32(self.address, number, 8)
        text = "@p mbarrier.init.shared::cta.b64 [$0], 1; @p fence.mbarrier_init.release.cluster; }"
        asm(f"{{ .reg .pred p; setp.lt.u32 p, $1, {self.count}; " + text, [], [own, number])

    def at(self, number: int) -> Value:
        """Where one of them is."""
        return add(self.address, 8 * number)

    def wait(self, number: int, parity: int) -> None:
        """Waits until all has arrived at one of them for the (2 · n + 1 + parity)-th time."""
        text = "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @!p bra again; }"
        asm("{ .reg .pred p; again: " + text, [], [self.at(number), const(parity)])


def expect(meeting: Value, size: int, where: Value) -> None:
    """Tells an mbarrier how many bytes are going to arrive, where `where` is not 0: once a turn."""
    text = f"@p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {size};"
    asm("{ .reg .pred p; setp.ne.s32 p, $1, 0; " + text + " }", [], [meeting, where])


def bulk_copy(to: Value, source: Value, size: int, meeting: Value, where: Value) -> None:
    """Begins to copy bytes, a multiple of 16, from global to shared memory, where `where` is not 0."""
    text = f"@p cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], {size}, [$2];"
    asm("{ .reg .pred p; setp.ne.s32 p, $3, 0; " + text + " }", [], [to, source, meeting, where])


def stream(
    count: int,
    carry: Sequence[Value],
    load: Callable[[Value], list[Value]],
    compute: Callable[[Value, list[Value], list[Value]], list[Value]],
) -> list[Value]:
    """`carry = compute(i, carry, load(i))` for i = 0 … count - 1, where each load is begun a turn ahead."""
    kept = len(carry)

    def turn(i: Value, values: list[Value]) -> list[Value]:
        following = load(add(i, 1))
        return [*compute(i, values[:kept], values[kept:]), *following]

    values = loop(count - 1, [*carry, *load(const(0))], turn)
    return compute(const(count - 1), values[:kept], values[kept:])


def loop(
    count: Value | int, carry: Sequence[Value], body: Callable[[Value, list[Value]], Sequence[Value]]
) -> list[Value]:
    """`carry = body(i, carry)` for i = 0 … count - 1."""
    if isinstance(count, int) and count == 0:
        return list(carry)
    operations: Any = scf  # whose annotations are of classes that it replaces
    op = operations.ForOp(const(0), _value(count), const(1), list(carry))
    with ir.InsertionPoint(op.body):
        scf.yield_(list(body(op.induction_variable, list(op.inner_iter_args))))
    return list(op.results)


def shared_address(ref: Value) -> Value:
    """Where an array in shared memory begins, as shared memory counts (32 bits)."""
    pointer = utils.memref_ptr(ref)
    return arith.trunci(i32(), llvm.ptrtoint(i64(), pointer))


def offset32(base: Value, index: Value, size: int) -> Value:
    """The address in shared memory of an element of `size` bytes."""
    return arith.addi(base, arith.muli(index, const(size)))


def halves(word: Value) -> list[Value]:
    """The two bfloat16 numbers of a register as float32, the lower first."""
    return [arith.bitcast(f32(), arith.shli(word, const(16))), arith.bitcast(f32(), arith.andi(word, const(-0x10000)))]


def pack(low: Value, high: Value) -> Value:
    """Two float32 numbers, rounded to bfloat16, as a register."""
    return asm("cvt.rn.bf16x2.f32 $0, $2, $1;", [i32()], [low, high])[0]


def total(values: Sequence[Value]) -> Value:
    """The sum of float32 numbers, in the order of a tree."""
    values = list(values)
    while len(values) > 1:
        values = [arith.addf(*pair) for pair in zip(values[0::2], values[1::2], strict=False)] + values[
            len(values) & ~1 :
        ]
    return values[0]


def warp_sum(value: Value, lanes: int = 1) -> Value:
    """The float32 sum over a warp's lanes whose numbers are equal modulo `lanes`, in each of them the same bits."""
    distance = 16
    while distance >= lanes:
        (other,) = asm(f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;", [f32()], [value], volatile=True)
        value = arith.addf(value, other)
        distance //= 2
    return value


def first_lane(value: Value) -> Value:
    """The float32 number of a warp's first lane, in each of them."""
    return asm("shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", [f32()], [value], volatile=True)[0]


def when(condition: Value, body: Callable[[], None]) -> None:
    """Does what `body` inlines where `condition`, an i1, holds."""
    operations: Any = scf  # whose annotations are of classes that it replaces
    branch = operations.IfOp(condition)
    with ir.InsertionPoint(branch.then_block):
        body()
        scf.yield_([])


def kernel(
    block: Callable[..., None],
    operands: Sequence[Any],
    out: Any,
    grid: Mapping[str, int],
    shared: Sequence[Any] = (),
    *,
    raw: bool = False,
    blocks: int = 1,
    warpgroups: int = 1,
) -> Any:
    """Runs a kernel which is written as what one of its threads does.

    Args:
      block: inlines that, given the addresses of the operands, the results and the shared memory, then the block's
        indices by the grid's names.
      operands: arrays, and references to those that are written to.
      out: shape and dtype of the result.
      grid: sizes by name; the name of `block` is the kernel's.
      shared: what to allocate in shared memory.
      raw: `block` is given Mosaic's launch context and the arrays themselves, and not addresses.
      blocks: of a cluster, which share their indices.
      warpgroups: of a block.
    """

    def body(*refs: Any) -> None:
        indices = [jax.lax.axis_index(name) for name in grid]
        scalars = [plgpu.Layout.WG_SPLAT(())] * len(indices)

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * len(refs), *scalars))
        def inline(context: Any, *args: Any) -> tuple[()]:
            arrays, indices = args[: len(refs)], args[len(refs) :]
            last = len(refs) - len(shared)
            addresses = [*map(address, arrays[:last]), *map(shared_address, arrays[last:])]
            numbers = dict(zip(grid, (index.registers.item() for index in indices), strict=True))
            block(*((context, *arrays) if raw else addresses), **numbers)
            return ()

        inline(*refs, *indices)

    body.__name__ = getattr(block, "func", block).__name__.strip("_")
    more: dict[str, Any] = {"cluster": (blocks,), "cluster_names": ("block",)} if blocks > 1 else {}
    more |= {"num_threads": warpgroups, "thread_name": "warpgroup"} if warpgroups > 1 else {}
    launched = plgpu.kernel(
        body,
        out_type=out,
        scratch_types=list(shared),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        **more,
    )
    return launched(*operands)
