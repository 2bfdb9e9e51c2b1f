"""What the 32 threads of a warp do together."""

from collections.abc import Callable, Sequence

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import arith

from pallas_kernels.ptx.values import Value, asm, const, f32, i32


def thread() -> Value:
    """The thread's number in its warpgroup."""
    return arith.andi(utils.thread_idx(), const(127))


def fragment_lane() -> tuple[Value, Value, Value]:
    """The thread's warp in its warpgroup, and g and q of its lane 4·g + q, as in the tensor cores' layouts."""
    number = arith.andi(thread(), const(31))
    return arith.shrui(thread(), const(5)), arith.shrui(number, const(2)), arith.andi(number, const(3))


def mma(acc: Sequence[Value], a: Sequence[Value], b: Sequence[Value]) -> list[Value]:
    """acc (16 × 8, float32) + a (16 × 16, bfloat16) · b (16 × 8, bfloat16), by a warp.

    Lane 4·g + q holds:
      acc: rows g, g, g + 8, g + 8 at columns 2·q, 2·q + 1, 2·q, 2·q + 1;
      a, in pairs along the inner axis: rows g, g + 8, g, g + 8 at pairs q, q, q + 4, q + 4;
      b, likewise: column g at pairs q, q + 4.
    """
    return asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        [f32()] * 4,
        [*a, *b, *acc],
    )


def load_matrices(at: Value, *, shift: int = 0, transposed: bool = False) -> list[Value]:
    """Four 8 × 8 matrices of bfloat16 in shared memory, as parts of factors of `mma`: row g at pair q of each.

    Args:
      at: in lane 8·m + r, the address of row r of matrix m: 16 bytes.
      shift: bytes to add to all addresses.
      transposed: column g at pair q instead.
    """
    trans = ".trans" if transposed else ""
    text = f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{$0, $1, $2, $3}}, [$4+{shift}];"
    return asm(text, [i32()] * 4, [at], volatile=True)


def shuffle_xor(value: Value, distance: int) -> Value:
    """The float32 number of the lane whose number differs in the bit `distance`."""
    text = f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;"
    return asm(text, [f32()], [value], volatile=True)[0]


def quad_reduce(combine: Callable[[Value, Value], Value], value: Value) -> Value:
    """Reduces the float32 numbers of lanes 4·g … 4·g + 3 with `combine`; each of them gets the result."""
    for distance in (1, 2):
        value = combine(value, shuffle_xor(value, distance))
    return value


def warp_sum(value: Value, lanes: int = 1) -> Value:
    """The float32 sum over the warp's lanes with the same number modulo `lanes`: the same bits in each of them."""
    distance = 16
    while distance >= lanes:
        value = arith.addf(value, shuffle_xor(value, distance))
        distance //= 2
    return value


def first_lane(value: Value) -> Value:
    """The float32 number of the warp's first lane, in every lane."""
    return asm("shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", [f32()], [value], volatile=True)[0]


def from_lane(value: Value, lane: Value) -> Value:
    """The 32-bit integer of another lane, whose number may be another in each."""
    text = "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;"
    return asm(text, [i32()], [value, lane], volatile=True)[0]


def sync_warp() -> None:
    """Keeps earlier loads before this point: otherwise ptxas delays them until their values are used."""
    asm("bar.warp.sync 0xffffffff;", [], [])
