"""What the kernel's phases have in common: products of rows with matrices, and what blocks tell each other.

A row's D numbers are N strips of 64, and a cluster of C blocks has a strip of each result. Of a product's inner axis
each block of a cluster has an equal share, so that its sums are part of 64 columns, which the blocks send each other.
All the boxes of weights that a block needs, of all products, are one stream through a ring of shared memory: it runs on
while the blocks wait for each other.

Clusters tell each other through global memory, the relay. They write to where all bits are set, and who needs it reads
until it finds something else: numbers that are computed never have all bits set. The next kernel sets them again.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import ptx, rows
from pallas_kernels.block.stream import STRIP
from pallas_kernels.ptx import Value

BOX = 64  # rows of a matrix that are copied together, 16 for each of four warps
THREADS, WARPS = 256, 8
QKV = 3  # strips of a cluster in the product that gives queries, keys and values
HIDDEN = 4  # strips of a cluster of the hidden units
MOST_STAGES = 24
_TOGETHER = 4  # boxes whose slots are filled again together
EXCHANGES = 5
QKV_BYTES = 2 * (QKV * STRIP + 8)  # from row to row of queries, keys and values in shared memory
RECORD = 4 * 68  # bytes of a running softmax: 64 sums, the maximum, the total, and what aligns the next
_BOX_BYTES = 2 * BOX * STRIP
_SUMS_BYTES = 4 * 8 * THREADS
_ROOM = (
    212 * 1024
)  # bytes of shared memory of a block, which has a multiprocessor to itself, but for what rounding takes


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is known when a kernel is built."""

    rows: int  # T
    strips: int  # N: of D, and clusters
    blocks: int  # C: of a cluster
    places: int  # S: of the cache
    scale: float  # of attention's scores
    epsilon: float  # of the norms

    @property
    def width(self) -> int:
        """D."""
        return STRIP * self.strips

    @property
    def share(self) -> int:
        """Boxes of a block along D. The last blocks may have some that are beyond the matrix."""
        return -(-self.strips // self.blocks)

    @property
    def hidden_share(self) -> int:
        """Boxes of a block along the hidden units."""
        return -(-HIDDEN * self.strips // self.blocks)

    @property
    def boxes(self) -> int:
        """Of a block: of queries, keys and values, of attention's output, and of the MLP's products."""
        return (QKV + 1 + HIDDEN) * self.share + self.hidden_share

    @staticmethod
    def row_bytes(share: int) -> int:
        """From row to row of a factor in shared memory, so that eight rows lie in different banks."""
        return 2 * BOX * share + 16

    @property
    def inbox(self) -> int:
        """Float32 numbers that a block gets of one strip's sums."""
        return self.blocks * self.rows * STRIP

    @property
    def stages(self) -> int:
        """Boxes of a block in flight."""
        return min(self.boxes, MOST_STAGES, (_ROOM - sum(self._small.values())) // _BOX_BYTES)

    @property
    def _small(self) -> dict[str, int]:
        """Bytes of shared memory by name."""
        return {
            "factor": self.rows * self.row_bytes(self.share),
            "second": self.rows * self.row_bytes(self.hidden_share),
            "statistics": 8 * self.rows,
            "sums": HIDDEN * _SUMS_BYTES,
            "inbox": 4 * QKV * self.inbox,
            "qkv": self.rows * QKV_BYTES,
            "records": self.rows * self.blocks * RECORD,
            "filled": 8 * MOST_STAGES,
            "meetings": 8 * EXCHANGES,
        }

    def scratch(self) -> dict[str, Any]:
        """Shared memory by name."""
        sizes = {name: -(-size // 16) * 4 for name, size in self._small.items()}
        boxes = plgpu.SMEM((self.stages, BOX, STRIP), jnp.bfloat16)
        return {"boxes": boxes} | {name: plgpu.SMEM((size,), jnp.uint32) for name, size in sizes.items()}


@dataclasses.dataclass(frozen=True)
class Here:
    """Where a thread is, and what its block shares."""

    plan: Plan
    place: rows.Place
    strip: Value  # of the cluster
    shared: dict[str, Value]  # addresses in shared memory by name

    @classmethod
    def of(cls, plan: Plan, strip: Value, memory: dict[str, Value]) -> "Here":
        """This thread's. `memory`: shared memory by the names of `Plan.scratch`."""
        shared = {name: ptx.shared_address(each) for name, each in memory.items()}
        place = rows.Place.here(rows.Spread(plan.width, plan.blocks, THREADS), memory["meetings"])
        return cls(plan, place, strip, shared)

    def prepare(self, counts: Sequence[int]) -> None:
        """Prepares what blocks send each other: so many numbers to a block in each exchange. All threads meet."""
        ptx.Meetings(self.shared["filled"], self.plan.stages, WARPS).prepare()
        self.place.prepare(counts)
        ptx.asm("bar.sync 0;", [], [])

    @property
    def rank(self) -> Value:
        """The block's number in its cluster."""
        return self.place.block

    def box_rows(self, share: int) -> list[Value]:
        """The first row of a matrix in each of the block's boxes of a strip."""
        first = ptx.mul(self.rank, share * BOX)
        return [ptx.add(first, box * BOX) for box in range(share)]

    def own_row(self) -> tuple[Value, Value]:
        """The row that the thread's warp has, and 1 where there is such a row, else 0."""
        return arith.minsi(self.place.warp, ptx.const(self.plan.rows - 1)), ptx.less(self.place.warp, self.plan.rows)


class Ring:
    """The boxes of weights of a block, in the order in which it takes them."""

    def __init__(self, here: Here, context: Any, memory: dict[str, Value], jobs: Sequence[tuple[Value, Value, Value]]):
        """`jobs`: of each box the matrix, and the first row and column."""
        self._plan, self._context, self._boxes, self._jobs = here.plan, context, memory["boxes"], jobs
        self._slots, self._half = here.shared["boxes"], arith.shrui(here.place.warp, ptx.const(2))
        self._filled = ptx.Meetings(here.shared["filled"], here.plan.stages, WARPS)
        phases: Any = None  # which we count ourselves
        filled = utils.memref_ptr(memory["filled"])
        self._barriers = utils.BarrierRef(filled, ptx.const(0), phases, here.plan.stages)
        self._warp, self._begun = here.place.warp, 0

    def begin(self, end: int) -> None:
        """Begins to bring the boxes up to `end`, as far as there are slots that nobody reads."""
        for box in range(self._begun, min(end, self._plan.boxes)):
            self._copy(box)
        self._begun = max(self._begun, min(end, self._plan.boxes))

    def _copy(self, box: int) -> None:
        """Begins to bring a box; a row's 16-byte pieces are exchanged by the row's number modulo 8.

        The warps take turns, for it takes a thread a while.
        """
        matrix, *corner = self._jobs[box]
        is_turn = arith.cmpi(arith.CmpIPredicate.eq, self._warp, ptx.const(box % WARPS))
        slot = box % self._plan.stages
        self._context.async_copy(
            src_ref=matrix,
            dst_ref=utils.memref_slice(self._boxes, slot),
            gmem_slice=tuple(utils.ds(arith.index_cast(ir.IndexType.get(), each), BOX) for each in corner),
            barrier=self._barriers[slot],
            swizzle=2 * STRIP,
            predicate=arith.andi(is_turn, utils.single_thread_predicate(scope=utils.ThreadSubset.WARP)),
        )

    def multiply(self, first: int, count: int, wide: int, factor: Value) -> list[list[Value]]:
        """The warp's sums of `wide` strips: for each 16 of its 32 columns four, in the order of `ptx.mma`.

        Args:
          first, count: boxes, of which those of the strips take turns.
          factor: rows in shared memory, of as many numbers as `count // wide` boxes have rows.
        """
        plan = self._plan
        group, g, q = ptx.lane()
        lane = arith.andi(ptx.thread(), ptx.const(31))
        # A lane says where a row of 8 numbers of a matrix begins: of matrix m row r.
        r, m = arith.andi(lane, ptx.const(7)), arith.shrui(lane, ptx.const(3))
        row = ptx.add(ptx.mul(group, 16), ptx.mul(arith.shrui(m, ptx.const(1)), 8), r)
        row_at = ptx.offset32(self._slots, row, 2 * STRIP)
        piece = ptx.add(arith.andi(m, ptx.const(1)), ptx.mul(self._half, 4))
        pairs = [ptx.add(row_at, ptx.mul(arith.xori(ptx.add(piece, 2 * pair), r), 16)) for pair in range(2)]
        # What comes of rows that there are not is not used, so these may be any row.
        x_row = ptx.offset32(factor, arith.minsi(g, ptx.const(plan.rows - 1)), plan.row_bytes(count // wide))
        x_at = ptx.add(x_row, ptx.mul(group, 32), ptx.mul(q, 4))
        sums = [[ptx.const(0.0, ptx.f32())] * 8 for _ in range(wide)]
        for i in range(count):
            box, strip = first + i, i % wide
            slot = box % plan.stages
            self._filled.wait(slot, box // plan.stages % 2)
            if strip == 0:
                texts = [f"ld.shared.b32 $0, [$1+{2 * BOX * (i // wide) + half}];" for half in (0, 16)]
                x = [ptx.asm(text, [ptx.i32()], [x_at], volatile=True)[0] for text in texts]
            text = f"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{$0, $1, $2, $3}}, [$4+{_BOX_BYTES * slot}];"
            for pair in range(2):
                a = ptx.asm(text, [ptx.i32()] * 4, [pairs[pair]], volatile=True)
                four = slice(4 * pair, 4 * pair + 4)
                sums[strip][four] = ptx.mma(sums[strip][four], a, x)
            is_last = i % _TOGETHER == _TOGETHER - 1 or i == count - 1
            if is_last and self._begun < min(box + 1 + plan.stages, plan.boxes):
                ptx.asm("bar.sync 0;", [], [])
                self.begin(box + 1 + plan.stages)
        return sums


def load(at: Value, count: int, where: Value, kind: Any = None) -> list[Value]:
    """Begins to load 1, 2 or 4 words from global memory; 0 where `where` is 0. See `rows.issue`."""
    outputs = [f"${i}" for i in range(count)]
    zeros = "".join(f"mov.b32 {each}, 0;" for each in outputs)
    vector = {1: ""}.get(count, f".v{count}")
    into = outputs[0] if count == 1 else "{" + ", ".join(outputs) + "}"
    text = (
        f"{{ .reg .pred p; setp.ne.s32 p, ${count + 1}, 0; {zeros} @p ld.global.cg{vector}.b32 {into}, [${count}]; }}"
    )
    return ptx.asm(text, [ptx.i32() if kind is None else kind] * count, [at, where], volatile=True)


def store(at: Value, word: Value, where: Value) -> None:
    """Writes a word to global memory, where `where` is not 0."""
    ptx.asm("{ .reg .pred p; setp.ne.s32 p, $2, 0; @p st.global.b32 [$0], $1; }", [], [at, word, where])


def keep(at: Value, values: Sequence[Value], where: Value) -> None:
    """Writes 1, 2 or 4 words to shared memory, where `where` is not 0."""
    count = len(values)
    vector = {1: ""}.get(count, f".v{count}")
    what = "$1" if count == 1 else "{" + ", ".join(f"${i + 1}" for i in range(count)) + "}"
    text = f"{{ .reg .pred p; setp.ne.s32 p, ${count + 1}, 0; @p st.shared{vector}.b32 [$0], {what}; }}"
    ptx.asm(text, [], [at, *values, where])


def where(condition: Value, value: Value, otherwise: float) -> Value:
    """The float32 value where the condition is not 0."""
    holds = arith.cmpi(arith.CmpIPredicate.ne, condition, ptx.const(0))
    return arith.select(holds, value, number(otherwise))


def load_pair(at: Value) -> list[Value]:
    """Two float32 numbers of shared memory."""
    return ptx.asm("ld.shared.v2.f32 {$0, $1}, [$2];", [ptx.f32()] * 2, [at], volatile=True)


def fma(a: Value, b: Value, c: Value) -> Value:
    """a · b + c."""
    return ptx.asm("fma.rn.f32 $0, $1, $2, $3;", [ptx.f32()], [a, b, c])[0]


def power(x: Value) -> Value:
    """2^x."""
    return ptx.asm("ex2.approx.ftz.f32 $0, $1;", [ptx.f32()], [x])[0]


def number(value: float) -> Value:
    """A float32 constant."""
    return ptx.const(value, ptx.f32())


class Norm:
    """The block's share of the rows' LayerNorm. All weights are begun to be loaded before they are needed."""

    def __init__(self, here: Here, scale: Value, bias: Value):
        plan = here.plan
        self._here, self._pairs = here, STRIP // 2 * plan.share
        self._turns = []
        for start in range(0, plan.rows * self._pairs, THREADS):
            each = ptx.add(here.place.thread, start)
            row, pair = (op(each, ptx.const(self._pairs)) for op in (arith.divui, arith.remui))
            is_pair = ptx.less(each, plan.rows * self._pairs)
            column = ptx.add(ptx.mul(here.rank, self._pairs), pair)
            is_there = arith.andi(is_pair, ptx.less(column, plan.width // 2))  # what is beyond counts as 0
            weights = [load(ptx.offset(vector, column, 4), 1, is_there)[0] for vector in (scale, bias)]
            self._turns.append((is_pair, row, pair, column, is_there, weights))

    def read(self, x: Value, moments: Value, fetch: Callable[..., list[list[Value]]]) -> Callable[[], None]:
        """Reads rows and their moments, at these addresses, by `load_all` or `await_all`.

        Returns:
          What writes the norm to `factor`. All threads meet, so that it can be read.
        """
        here, plan = self._here, self._here.plan
        row, is_row = here.own_row()
        is_strip = ptx.less(here.place.lane, plan.strips)
        strip_at = ptx.offset(moments, ptx.add(ptx.mul(row, plan.strips), here.place.lane), 8)
        pieces = [(strip_at, arith.andi(is_row, is_strip), 2)]
        for _, x_row, _, column, is_there, _ in self._turns:
            pieces.append((ptx.offset(x, ptx.add(ptx.mul(x_row, plan.width // 2), column), 4), is_there, 1))
        of_strip, *words = fetch(pieces)

        def finish() -> None:
            mean, squares = (arith.bitcast(ptx.f32(), each) for each in of_strip)
            # Relative to the first strip's mean, so that both sums are made at once and nothing is cancelled.
            first = ptx.first_lane(mean)
            away = where(is_strip, arith.subf(mean, first), 0.0)
            squares = ptx.warp_sum(fma(arith.mulf(away, away), number(STRIP), squares))
            away = arith.mulf(ptx.warp_sum(away), number(1 / plan.strips))
            squares = fma(arith.mulf(away, away), number(-plan.width), squares)
            variance = fma(squares, number(1 / plan.width), number(plan.epsilon))
            (factor,) = ptx.asm("rsqrt.approx.f32 $0, $1;", [ptx.f32()], [variance])
            mean_of_all = arith.addf(first, away)
            at = ptx.offset32(here.shared["statistics"], row, 8)
            keep(at, [mean_of_all, factor], arith.andi(is_row, ptx.less(here.place.lane, 1)))
            ptx.asm("bar.sync 0;", [], [])
            self._write([word for (word,) in words])
            ptx.asm("bar.sync 0;", [], [])

        return finish

    def _write(self, words: Sequence[Value]) -> None:
        here, plan = self._here, self._here.plan
        for (is_pair, row, pair, _, _, weights), word in zip(self._turns, words, strict=True):
            row = arith.minsi(row, ptx.const(plan.rows - 1))
            mean, factor = load_pair(ptx.offset32(here.shared["statistics"], row, 8))
            normed = [
                fma(arith.mulf(arith.subf(each, mean), factor), scale, bias)
                for each, scale, bias in zip(*map(ptx.halves, (word, *weights)), strict=True)
            ]
            at = ptx.add(ptx.offset32(here.shared["factor"], row, plan.row_bytes(plan.share)), ptx.mul(pair, 4))
            keep(at, [ptx.pack(*normed)], is_pair)


def block_sums(here: Here, sums: Sequence[Sequence[Value]]) -> list[list[Value]]:
    """Adds up what the warps have of each strip: of columns 8·w + g, of warp w, those of rows 2·q and 2·q + 1."""
    warp = here.place.warp
    mine = ptx.offset32(ptx.offset32(here.shared["sums"], warp, 4 * 32 * 8), here.place.lane, 4)
    for strip, values in enumerate(sums):
        for i, value in enumerate(values):
            ptx.asm(f"st.shared.f32 [$0+{strip * _SUMS_BYTES + 4 * 32 * i}], $1;", [], [mine, value])
    ptx.asm("bar.sync 0;", [], [])
    first = ptx.add(ptx.mul(arith.shrui(warp, ptx.const(2)), 4 * 8), ptx.mul(arith.andi(warp, ptx.const(3)), 2))
    theirs = ptx.offset32(ptx.offset32(here.shared["sums"], first, 4 * 32), here.place.lane, 4)

    def total(strip: int, i: int) -> Value:
        shifts = [strip * _SUMS_BYTES + 4 * 32 * (8 * group + i) for group in range(4)]
        texts = [f"ld.shared.f32 $0, [$1+{shift}];" for shift in shifts]
        return ptx.total([ptx.asm(text, [ptx.f32()], [theirs], volatile=True)[0] for text in texts])

    return [[total(strip, i) for i in range(2)] for strip in range(len(sums))]


def send_sums(here: Here, exchange: int, sums: Sequence[Value], slots: int, slot: int, to: Any) -> None:
    """Sends `block_sums` of a strip to the inbox [C, slots, T, 64] of blocks `to`, of each cluster its own."""
    plan = here.plan
    _, g, q = ptx.lane()
    source = ptx.add(ptx.mul(here.rank, slots), slot)
    column = ptx.add(ptx.mul(here.place.warp, 8), g)
    for i, value in enumerate(sums[: plan.rows]):
        row = ptx.add(ptx.mul(q, 2), i)
        at = ptx.offset32(
            ptx.offset32(ptx.offset32(here.shared["inbox"], source, 4 * STRIP * plan.rows), row, 4 * STRIP), column, 4
        )
        for block in to:
            here.place.send(exchange, ptx.const(block), at, value, ptx.less(row, plan.rows))


def inbox_pair(here: Here, slots: int, slot: Value | int, row: Value, pair: Value) -> list[Value]:
    """The sums of two columns of an inbox, over the cluster's blocks."""
    plan = here.plan
    row_at = ptx.add(ptx.mul(slot, plan.rows), row)
    at = ptx.add(ptx.offset32(here.shared["inbox"], row_at, 4 * STRIP), ptx.mul(pair, 8))
    parts = [load_pair(ptx.add(at, 4 * STRIP * plan.rows * slots * source)) for source in range(plan.blocks)]
    return [ptx.total([part[i] for part in parts]) for i in range(2)]


def clear(here: Here, relay: Value, words: int) -> None:
    """Sets all bits of a relay, which the next kernel uses."""
    own = ptx.add(ptx.mul(here.strip, here.plan.blocks), here.rank)
    first = ptx.add(ptx.mul(own, THREADS), here.place.thread)
    for start in range(0, words, here.plan.strips * here.plan.blocks * THREADS):
        word = ptx.add(first, start)
        store(ptx.offset(relay, word, 4), ptx.const(-1), ptx.less(word, words))


def block_does(here: Here, most: int, body: Callable[[], None]) -> None:
    """Lets the first so many blocks of the cluster do something."""
    ptx.when(arith.cmpi(arith.CmpIPredicate.slt, here.rank, ptx.const(most)), body)


def gather(here: Here, relay: Value, width: int, share: int) -> None:
    """Brings the block's share of rows [T, width], bfloat16, to `second` as soon as it is there. All threads meet."""
    plan = here.plan
    count = 2 * BOX * share // 16
    pieces, targets = [], []
    for start in range(0, plan.rows * count, THREADS):
        each = ptx.add(here.place.thread, start)
        row, piece = (op(each, ptx.const(count)) for op in (arith.divui, arith.remui))
        is_piece = ptx.less(each, plan.rows * count)
        from_piece = ptx.add(ptx.mul(here.rank, count), piece)
        is_there = arith.andi(is_piece, ptx.less(from_piece, width // 8))  # what is beyond counts as 0
        pieces.append((ptx.offset(ptx.offset(relay, row, 2 * width), from_piece, 16), is_there, 4))
        to = ptx.add(ptx.offset32(here.shared["second"], row, plan.row_bytes(share)), ptx.mul(piece, 16))
        targets.append((to, is_piece))
    for (to, is_piece), words in zip(targets, await_all(pieces), strict=True):
        keep(to, words, is_piece)
    ptx.asm("bar.sync 0;", [], [])


Piece = tuple[Value, Value, int]  # an address in global memory, 1 where it is there, else 0, and how many words


def load_all(pieces: Sequence[Piece]) -> list[list[Value]]:
    """Begins to load words; 0 of what is not there."""
    loaded = [load(at, size, is_there) for at, is_there, size in pieces]
    rows.issue()
    return loaded


def await_all(pieces: Sequence[Piece]) -> list[list[Value]]:
    """Loads words of a relay until none of them has all bits set; 0 of what is not there."""
    count = sum(size for _, _, size in pieces)
    declared, begun, loads, tests = "", "", "", ""
    first = 0
    for i, (_, _, size) in enumerate(pieces):
        outputs = [f"${first + j}" for j in range(size)]
        first += size
        declared += f" .reg .pred p{i};"
        begun += f" setp.ne.s32 p{i}, ${count + 2 * i + 1}, 0;" + "".join(f" mov.b32 {each}, 0;" for each in outputs)
        vector = {1: ""}.get(size, f".v{size}")
        into = outputs[0] if size == 1 else "{" + ", ".join(outputs) + "}"
        loads += f" @p{i} ld.relaxed.gpu.global{vector}.b32 {into}, [${count + 2 * i}];"
        tests += "".join(f" setp.eq.or.s32 missing, {each}, -1, missing;" for each in outputs)
    text = (
        f"{{ .reg .pred missing;{declared}{begun} again:{loads} setp.ne.s32 missing, 0, 0;{tests}"
        " @missing bra again; }"
    )
    operands = [each for at, is_there, _ in pieces for each in (at, is_there)]
    words = iter(ptx.asm(text, [ptx.i32()] * count, operands, volatile=True))
    return [[next(words) for _ in range(size)] for _, _, size in pieces]


@dataclasses.dataclass(frozen=True)
class Residual:
    """What a warp of a cluster's first block has of its row: two columns a lane of the cluster's strip."""

    here: Here
    is_row: Value
    word: Value
    place: Value  # number of the word in its array
    moments: Value  # number of the strip's two moments in their array

    @classmethod
    def of(cls, here: Here, x: Value) -> "Residual":
        """Begins to load it."""
        plan = here.plan
        row, is_row = here.own_row()
        column = ptx.add(ptx.mul(here.strip, STRIP // 2), here.place.lane)  # of words
        place = ptx.add(ptx.mul(row, plan.width // 2), column)
        (word,) = load(ptx.offset(x, place, 4), 1, is_row)
        rows.issue()
        return cls(here, is_row, word, place, ptx.add(ptx.mul(row, plan.strips), here.strip))

    def add(self, exchange: int, bias: Value, x: Value, moments: Value) -> None:
        """Adds a product's sums, and writes the result and its moments."""
        here, lane = self.here, self.here.place.lane
        row, _ = here.own_row()
        here.place.receive(exchange)
        sums = inbox_pair(here, 1, 0, row, lane)
        added = [arith.addf(*pair) for pair in zip(sums, ptx.halves(bias), strict=True)]
        word = ptx.pack(*(arith.addf(*pair) for pair in zip(ptx.halves(self.word), added, strict=True)))
        store(ptx.offset(x, self.place, 4), word, self.is_row)
        values = ptx.halves(word)
        # Relative to the first number, so that both sums are made at once and nothing is cancelled.
        first = ptx.first_lane(values[0])
        away = [arith.subf(each, first) for each in values]
        squares = ptx.warp_sum(fma(away[0], away[0], arith.mulf(away[1], away[1])))
        mean = arith.mulf(ptx.warp_sum(arith.addf(*away)), number(1 / STRIP))
        squares = fma(arith.mulf(mean, mean), number(-STRIP), squares)
        mean = arith.addf(first, mean)
        first_lane = arith.andi(self.is_row, ptx.less(lane, 1))
        at = ptx.offset(moments, self.moments, 8)
        for shift, each in ((0, mean), (4, squares)):
            store(arith.addi(at, ptx.const(shift, ptx.i64())), each, first_lane)
