"""A device in plain Python, which runs plans as the programs will: page by page, place by place.

What it writes for a token is a number that depends on the token, its position, how it was computed, and all that its
query can see; so does the token that it draws. So if a sequence ever reads a place that holds anything else than what
the sequence alone would have there, the tokens after it differ.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence

from gptjax.scheduling.plan import DecodeCall, Plan, PrefillCall

# Numbers only are hashed: strings have other hashes in each run of Python, so that no failure could be repeated.
PREFILL, DECODE, LOGITS = range(3)

How = int | tuple[int, ...]
Written = Callable[[int, int, int, int], How]  # how a token was computed, from kind, position, count and size


def exact(kind: int, start: int, count: int, size: int) -> How:
    """Computations that round alike whatever the path and the sizes."""
    return 0


def by_path(kind: int, start: int, count: int, size: int) -> How:
    """Decode rounds differently from prefill."""
    return kind


def by_size(kind: int, start: int, count: int, size: int) -> How:
    """Everything rounds differently at other sizes, as the programs of today do."""
    return kind, start, count, size


class Model:
    """What is computed, given all that a query sees."""

    def __init__(self, windows: Sequence[int | None], vocabulary: int, written: Written):
        self.windows = windows
        self.vocabulary = vocabulary
        self.written = written

    def value(self, token: int, position: int, how: How, seen: Sequence[tuple[int, ...]]) -> int:
        return hash((token, position, how, *seen))

    def logits(self, position: int, seen: Sequence[tuple[int, ...]]) -> int:
        return hash((LOGITS, position, *seen))

    def draw(self, logits: int) -> int:
        return logits % self.vocabulary

    def first(self, pool: int, position: int) -> int:
        window = self.windows[pool % len(self.windows)]
        return 0 if window is None else max(0, position - window + 1)


@dataclasses.dataclass
class Alone:
    """A request that has the device for itself, its values in lists."""

    model: Model
    values: list[int] = dataclasses.field(default_factory=list)

    def feed(self, token: int, how: How) -> int:
        model, position = self.model, len(self.values)
        pools = range(len(model.windows))
        before = [tuple(self.values[model.first(pool, position) :]) for pool in pools]
        self.values.append(model.value(token, position, how, before))
        return model.logits(position, [tuple(self.values[model.first(pool, position) :]) for pool in pools])


def alone(model: Model, prompt: Sequence[int], count: int, pieces: Sequence[tuple[int, int]], rows: int) -> list[int]:
    """The tokens of a request that runs alone.

    Args:
      pieces: tokens and size of the calls that its prompt is read in.
      rows: size of decode calls.
    """
    run, logits = Alone(model), 0
    for tokens, size in pieces:
        start = len(run.values)
        for token in prompt[start : start + tokens]:
            logits = run.feed(token, model.written(PREFILL, start, tokens, size))
    drawn = []
    while True:
        drawn.append(model.draw(logits))
        if len(drawn) == count:
            return drawn
        logits = run.feed(drawn[-1], model.written(DECODE, len(run.values), 1, rows))


class Device:
    """Pools, tables and slots, changed by plans alone. Those of each shard, one shard after another."""

    def __init__(
        self, model: Model, pages: Sequence[int], page: int, slots: int, row_sizes: Sequence[int], shards: int = 1
    ):
        self.model = model
        self.page = page
        self.slots = slots  # of each shard
        self.row_sizes = row_sizes
        self.pools = [[[None] * page for _ in range(count)] for count in [*pages] * shards]  # place: (position, value)
        self.tables: list[list[dict[int, int]]] = [[{} for _ in range(shards * slots)] for _ in self.pools]
        self.logits: list[int | None] = [None] * (shards * slots)
        self.last_plan = 0
        self.written: list[set[tuple[int, int]]] = []  # (pool, page) that the last plan wrote to, call by call
        self.given = 0  # tokens replayed

    def run(self, plan: Plan) -> list[list[int]]:
        """Executes a plan. Returns the tokens that its rows drew."""
        assert plan.number == self.last_plan + 1, "plans are dispatched in order, each once"
        self.last_plan = plan.number
        self.written = [set()]
        for join in plan.joins:
            for tables in self.tables:
                tables[join.slot] = {}
            self.logits[join.slot] = None
        for entry in plan.tables:
            assert entry.pool in self._pools_of(entry.slot)
            assert 0 <= entry.page < len(self.pools[entry.pool])
            self.tables[entry.pool][entry.slot][entry.index] = entry.page
        for copy in plan.copies:
            assert copy.source and copy.target and 0 < copy.count < self.page
            source = self.pools[copy.pool][copy.source]
            # Of the other places, nothing is promised.
            self.pools[copy.pool][copy.target] = source[: copy.count] + [None] * (self.page - copy.count)
            self.written[0].add((copy.pool, copy.target))
        for call in plan.prefill:
            self._prefill(call)
        return [] if plan.decode is None else self._decode(plan.decode)

    def _prefill(self, call: PrefillCall) -> None:
        at = 0
        assert len({piece.slot for piece in call.pieces}) == len(call.pieces)
        for piece in call.pieces:
            assert piece.start == at and piece.count > 0
            at += piece.count
            how = self.model.written(PREFILL, piece.position, piece.count, call.size)
            logits = None
            for index in range(piece.count):
                logits = self._feed(piece.slot, piece.position + index, call.tokens[piece.start + index], how)
            if piece.ends:
                self.logits[piece.slot] = logits
        assert at == len(call.tokens)
        read = Counter[int]()
        for piece in call.pieces:
            read[piece.slot // self.slots] += piece.count
        assert max(read.values()) <= call.size

    def _decode(self, call: DecodeCall) -> list[list[int]]:
        of_shards = Counter(row.slot // self.slots for row in call.rows)
        assert max(of_shards.values()) <= call.size and call.size in self.row_sizes
        assert len({row.slot for row in call.rows}) == len(call.rows)
        drawn: list[list[int]] = [[] for _ in call.rows]
        for step in range(call.steps):
            for number, row in enumerate(call.rows):
                if step >= len(row.given) + row.draws:
                    continue
                if step < len(row.given):
                    token = row.given[step]
                    self.given += 1
                else:
                    logits = self.logits[row.slot]
                    assert logits is not None, "a slot without logits draws"
                    token = self.model.draw(logits)
                    drawn[number].append(token)
                if step < row.feeds:
                    position = row.position + step
                    how = self.model.written(DECODE, position, 1, call.size)
                    self.logits[row.slot] = self._feed(row.slot, position, token, how)
        assert all(len(row.given) + row.draws <= call.steps for row in call.rows)
        return drawn

    def _pools_of(self, slot: int) -> range:
        kinds = len(self.model.windows)
        return range(slot // self.slots * kinds, (slot // self.slots + 1) * kinds)

    def _feed(self, slot: int, position: int, token: int, how: How) -> int:
        pools = self._pools_of(slot)
        before = [self._seen(pool, slot, position, position) for pool in pools]
        value = self.model.value(token, position, how, before)
        for pool in pools:
            page = self.tables[pool][slot].get(position // self.page, 0)
            assert page, f"slot {slot} writes position {position} to page 0 of pool {pool}"
            self.pools[pool][page][position % self.page] = (position, value)
            self.written[0].add((pool, page))
        return self.model.logits(position, [self._seen(pool, slot, position, position + 1) for pool in pools])

    def _seen(self, pool: int, slot: int, position: int, end: int) -> tuple[int, ...]:
        values = []
        table = self.tables[pool][slot]
        for each in range(self.model.first(pool, position), end):
            page = table.get(each // self.page, 0)
            assert page, f"slot {slot} at {position} reads position {each} from page 0 of pool {pool}"
            place = self.pools[pool][page][each % self.page]
            assert place is not None and place[0] == each, f"slot {slot} at {position} reads {each}, finds {place}"
            values.append(place[1])
        return tuple(values)
