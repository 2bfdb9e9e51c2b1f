"""A scheduler and a naive device together, checked at every step."""

import dataclasses
from collections import Counter, deque
from collections.abc import Sequence

from gptjax.scheduling.allocator import Allocator
from gptjax.scheduling.plan import Plan
from gptjax.scheduling.policy import Policy, smallest
from gptjax.scheduling.pool import Pool
from gptjax.scheduling.scheduler import Scheduler
from gptjax.scheduling.sequence import Sequence as Running
from tests.scheduling import naive_device
from tests.scheduling.naive_device import Device, Model, Written

PAGE = 4


@dataclasses.dataclass
class Asked:
    """A request, and what it got so far."""

    prompt: list[int]
    count: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    cached: int = 0
    rows: int = 0
    held: bool = False
    one_by_one: bool = False


class Harness:
    """Runs plans as soon as they are made, and hands out their tokens later."""

    def __init__(
        self,
        policy: Policy,
        pages: Sequence[int],
        windows: Sequence[int | None],
        *,
        written: Written = naive_device.exact,
        vocabulary: int = 3,
    ):
        self.policy = policy
        self.windows = windows
        self.model = Model(windows, vocabulary, written)
        self.pages = pages
        self.open: dict[int, Asked] = {}
        self.done: dict[int, Asked] = {}
        self.ended: list[Asked] = []  # by schedulers that were replaced
        self.plans: list[Plan] = []
        self._begin()

    def _begin(self) -> None:
        kinds = list(zip(self.pages, self.windows, strict=True))
        self.pools = [Pool(count, window) for _ in range(self.policy.shards) for count, window in kinds]
        self.scheduler = Scheduler(self.policy, self.pools)
        self.device = self._new_device()
        self.under_way: deque[tuple[int, list[list[int]]]] = deque()

    def _new_device(self) -> Device:
        policy = self.policy
        return Device(self.model, self.pages, policy.page, policy.slots, policy.row_sizes, policy.shards)

    @property
    def running(self) -> int:
        """Requests with a slot."""
        return len(self.scheduler._running)

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self.scheduler._waiting)

    @property
    def in_flight(self) -> int:
        """Plans whose tokens have not been received."""
        return len(self.scheduler._in_flight)

    def add(self, prompt: Sequence[int], count: int, rows: int = 0, one_by_one: bool = False) -> int:
        number = self.scheduler.add(prompt, count, rows=rows, one_by_one=one_by_one)
        self.open[number] = Asked(list(prompt), count, rows=rows, one_by_one=one_by_one)
        return number

    def hold(self, request: int, held: bool) -> None:
        self.open[request].held = held
        self.scheduler.hold(request, held)

    def replace(self) -> None:
        """Another scheduler and device go on with what is open."""
        left = list(self.open.values())
        self.ended += self.done.values()
        self.open, self.done = {}, {}
        self._begin()
        for asked in left:
            how = {"rows": asked.rows, "one_by_one": asked.one_by_one}
            number = self.scheduler.add(asked.prompt, asked.count, drawn=asked.tokens, **how)
            self.open[number] = asked
            self.scheduler.hold(number, asked.held)
        self.check()

    def plan(self, late: frozenset[int] = frozenset()) -> Plan | None:
        """Makes a plan and runs it."""
        plan = self.scheduler.plan(late=late)
        self.check()
        if plan is not None:
            plan = Plan.from_json(plan.to_json())
            self._check_writes(plan)
            self._check_one_by_one(plan, late)
            self._check_cuts(plan)
            tokens = self.device.run(plan)
            if plan.draws:
                self.under_way.append((plan.number, tokens))
            self.plans.append(plan)
        return plan

    def receive(self) -> None:
        """Hands out the tokens of the oldest plan."""
        number, tokens = self.under_way.popleft()
        for drawn in self.scheduler.receive(number, tokens):
            asked = self.open[drawn.request]
            asked.tokens += drawn.tokens
            if len(asked.tokens) == asked.count:
                self.end(drawn.request)

    def end(self, request: int) -> None:
        asked = self.open.pop(request)
        asked.cached = self.scheduler.cached_tokens(request)
        self.done[request] = asked
        self.scheduler.end(request)
        self.check()

    def lose(self) -> None:
        """The device loses everything."""
        self.scheduler.lost()
        last = self.device.last_plan
        self.device = self._new_device()
        self.device.last_plan = last
        self.under_way.clear()
        self.check()

    def finish(self, ahead: int = 1) -> None:
        """Runs until no request is open."""
        while self.open:
            plan = self.plan()
            assert plan is not None or self.under_way, "nothing is planned, and nothing is under way"
            while len(self.under_way) > (0 if plan is None else ahead):
                self.receive()
        while self.under_way:
            self.receive()

    def expected(self, asked: Asked) -> list[int]:
        """The tokens it would have got alone."""
        policy, pieces, left = self.policy, [], len(asked.prompt)
        while left:
            count = policy.piece(left, policy.chunk)
            pieces.append((count, smallest(policy.call_sizes, count)))
            left -= count
        return naive_device.alone(self.model, asked.prompt, asked.count, pieces, asked.rows or policy.row_sizes[0])

    def check_tokens(self) -> None:
        """All that was received is as if each request had run alone."""
        for asked in (*self.ended, *self.done.values(), *self.open.values()):
            assert asked.tokens == self.expected(asked)[: len(asked.tokens)]

    def check(self) -> None:
        """Every page is held as often as tables and the tree name it; nothing was lost."""
        scheduler = self.scheduler
        for shard, allocator in enumerate(scheduler._allocators):
            assert allocator.pools == self.pools[allocator.first :][: len(self.windows)]
            running = [sequence for sequence in scheduler._running if sequence.shard == shard]
            self._check_pages(allocator, running)
            slots = [sequence.slot for sequence in running] + scheduler._free_slots[shard]
            assert sorted(slots) == [shard * self.policy.slots + slot for slot in range(self.policy.slots)]
        ages = [sequence.number for sequence in scheduler._running], [each.number for each in scheduler._waiting]
        assert all(list(each) == sorted(each) for each in ages)

    def _check_pages(self, allocator: Allocator, running: Sequence[Running]) -> None:
        for number, pool in enumerate(allocator.pools):
            pool.check()
            held: Counter[int] = Counter()
            for sequence in running:
                held.update(page for page in sequence.pages[number] if page)
                held.update(page for at, page in sequence.sources if at == number)
            held.update(node.pages[number] for node in allocator.tree.nodes() if node.pages[number])
            assert {page: pool.holders(page) for page in range(pool.size + 1) if pool.holders(page)} == held
        for node in allocator.tree.nodes():
            assert any(node.pages) or node.children, "a node without pages"
            assert all(node.pages[n] for n, pool in enumerate(allocator.pools) if pool.window is None)

    def _check_one_by_one(self, plan: Plan, late: frozenset[int]) -> None:
        """Requests whose tokens are drawn one by one have all those before, and keep others from several steps."""
        numbers = {sequence.slot: sequence.number for sequence in self.scheduler._running}
        for row in plan.decode.rows if plan.decode else ():
            asked = self.open[numbers[row.slot]]
            assert numbers[row.slot] not in late
            if asked.one_by_one and row.draws:
                assert row.draws == plan.decode.steps == 1
                assert row.position == len(asked.prompt) + len(asked.tokens)

    def _check_cuts(self, plan: Plan) -> None:
        """Prompts are cut at the policy's multiples; the last chunk of one in calls of its own may be halved."""
        read: Counter[int] = Counter()
        for call in plan.prefill:
            of_shards = Counter(self.policy.shard(piece.slot) for piece in call.pieces)
            assert max(of_shards.values()) <= (self.policy.pieces if self.policy.packed else 1)
            for piece in call.pieces:
                read[self.policy.shard(piece.slot)] += piece.count
                multiple = self.policy.chunk_multiple if self.policy.packed else max(1, self.policy.chunk // 2)
                start = piece.position if self.policy.packed or self.policy.chunk_multiple > 1 else 0
                assert piece.ends or (start + piece.count) % multiple == 0
        assert max(read.values(), default=0) <= self.policy.chunk

    def _check_writes(self, plan: Plan) -> None:
        """No page that is written to has another holder, and none of a plan's pages has two uses."""
        slots = {sequence.slot: sequence for sequence in self.scheduler._running}
        page = self.policy.page
        spans = [(piece.slot, piece.position, piece.count) for call in plan.prefill for piece in call.pieces]
        spans += [(row.slot, row.position, row.feeds) for row in plan.decode.rows] if plan.decode else []
        written = Counter()
        for number, pool in enumerate(self.pools):
            shard, kind = divmod(number, len(self.windows))
            of_slot: dict[int, set[int]] = {}
            for slot, position, count in spans:
                if not count or self.policy.shard(slot) != shard:
                    continue
                for index in range(position // page, -(-(position + count) // page)):
                    of_slot.setdefault(slot, set()).add(slots[slot].pages[kind][index])
            written.update((number, each) for pages in of_slot.values() for each in pages)
            assert all(pool.holders(each) == 1 for pages in of_slot.values() for each in pages)
        targets = [(copy.pool, copy.target) for copy in plan.copies]
        assert max(written.values(), default=1) == 1 and len(set(targets)) == len(targets)
        assert not {(copy.pool, copy.source) for copy in plan.copies} & ({*written} | {*targets})


def small(pages=40, *, window=None, sliding=40, written=naive_device.by_path, **policy) -> Harness:
    """One of 4 slots, chunks of 16 tokens and 39 pages, if nothing else is said."""
    policy = Policy(**{"slots": 4, "chunk": 16, "page": PAGE, **policy})
    pools = ([pages, sliding], [None, window]) if window else ([pages], [None])
    return Harness(policy, *pools, written=written)


def small_asked(**policy) -> Harness:
    """One whose requests ask for rows."""
    same = Policy.same_bits(slots=4, chunk=16, page=PAGE, rows="asked", **policy)
    return Harness(same, [40], [None], written=naive_device.by_size)


def prompt_of(length: int, first: int = 0) -> list[int]:
    return [(first + index * index) % 3 for index in range(length)]


def read_by(plan: Plan | None) -> dict[int, int]:
    """Prompt tokens that a plan reads, by slot."""
    assert plan is not None
    return {piece.slot: piece.count for call in plan.prefill for piece in call.pieces}


def rows_of(plan: Plan | None) -> list[int]:
    """The slots of a plan's decode call."""
    assert plan is not None and plan.decode is not None
    return [row.slot for row in plan.decode.rows]
