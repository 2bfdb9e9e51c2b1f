"""Random joins, leaves, cancels, holds, losses and evictions, against a naive device: 10,000 requests in a full run."""

import dataclasses
import random

import pytest

from gptjax.scheduling.policy import Policy
from tests.fuzz import rounds
from tests.scheduling import naive_device
from tests.scheduling.harness import PAGE, Harness
from tests.scheduling.naive_device import Written


@dataclasses.dataclass(frozen=True)
class Case:
    policy: Policy
    windows: tuple[int | None, ...]
    written: Written
    longest: int = 40


CASES = {
    "full": Case(Policy(4, 8, page=PAGE), (None,), naive_device.by_path),
    "sliding": Case(Policy(4, 8, steps=3, page=PAGE), (5,), naive_device.by_path),
    "both": Case(Policy(5, 16, steps=4, page=PAGE, pieces=2), (None, 6), naive_device.by_path),
    "window of a page": Case(Policy(3, 4, steps=2, page=PAGE), (None, 4), naive_device.by_path),
    "window of one": Case(Policy(3, 8, page=PAGE), (None, 1), naive_device.by_path),
    "decoded are shared": Case(Policy(4, 8, steps=4, page=PAGE, share_decoded=True), (None, 9), naive_device.exact),
    "cut at pages": Case(Policy(4, 16, page=PAGE, chunk_multiple=PAGE), (None, 6), naive_device.by_path),
    "cut at two pages": Case(Policy(4, 16, page=PAGE, chunk_multiple=2 * PAGE), (None, 6), naive_device.by_path),
    "today's bits": Case(Policy.same_bits(slots=4, chunk=8, steps=2, page=PAGE), (None, 6), naive_device.by_size),
    "today's bits, small chunks": Case(Policy.same_bits(slots=4, chunk=2, page=PAGE), (None, 6), naive_device.by_size),
    "rows as asked": Case(
        Policy.same_bits(slots=4, chunk=8, steps=3, page=PAGE, rows="asked"), (None, 6), naive_device.by_size
    ),
    "rows as asked, all is reused": Case(
        Policy(5, 8, steps=2, page=PAGE, packed=False, rows="asked", share_decoded=True), (None, 6), naive_device.exact
    ),
    "nothing is reused": Case(Policy(4, 8, page=PAGE, reuse=False), (None, 6), naive_device.by_path),
    "shards": Case(Policy(3, 16, steps=4, page=PAGE, pieces=2, shards=3), (None, 6), naive_device.by_path),
    "shards, today's bits": Case(
        Policy.same_bits(slots=2, chunk=8, steps=2, page=PAGE, shards=2), (None, 6), naive_device.by_size
    ),
    "shards, rows as asked": Case(
        Policy.same_bits(slots=4, chunk=8, steps=3, page=PAGE, rows="asked", shards=2), (None, 6), naive_device.by_size
    ),
    "one slot": Case(Policy(1, 8, steps=2, page=PAGE), (None, 6), naive_device.by_path),
}


def _harness(case: Case, roomy: int) -> Harness:
    policy, most = case.policy, []
    for window in case.windows:
        whole = policy.pages(case.longest)
        across = whole if window is None else policy.pages_across(window - 1 + max(policy.chunk + 1, policy.steps))
        most.append(1 + min(whole, across) + roomy)
    return Harness(policy, most, case.windows, written=case.written)


def _request(dice: random.Random, harness: Harness, longest: int) -> tuple[list[int], int]:
    """A prompt of which a part is often that of another request, or follows on what one drew."""
    earlier = [*harness.open.values(), *list(harness.done.values())[-6:]]
    prompt: list[int] = []
    if earlier and dice.random() < 0.7:
        other = dice.choice(earlier)
        said = other.prompt + other.tokens
        prompt = said[: dice.randint(0, len(said))]
    prompt = prompt[: longest - 1]
    more = dice.choice((0, 1, PAGE, dice.randint(0, longest)))
    prompt = (prompt + dice.choices(range(3), k=more))[:longest] or [0]
    return prompt, dice.randint(1, longest - len(prompt) + 1)


@pytest.mark.parametrize(
    ("written", "drawn"),
    [
        (naive_device.exact, [336, 993, 248, 604]),
        (naive_device.by_path, [336, 948, 102, 561]),
        (naive_device.by_size, [462, 150, 314, 156]),
    ],
)
def test_the_device_draws_the_same_in_each_run_of_python(written, drawn):
    model = naive_device.Model((None, 2), 1000, written)
    assert naive_device.alone(model, [5, 6, 7], 4, [(2, 2), (1, 1)], 1) == drawn


@pytest.mark.fuzz
@pytest.mark.parametrize("name", CASES)
def test_any_load(name):
    case, requests = CASES[name], rounds(1000)
    dice = random.Random(name)
    while requests > 0:
        harness = _harness(case, dice.choice((0, 0, 1, 3, 20)))
        count = min(requests, dice.choice((5, 50, 200)))
        requests -= count
        _load(dice, harness, count, case.longest)
        harness.check_tokens()


def _load(dice: random.Random, harness: Harness, count: int, longest: int) -> None:
    ahead, risk = dice.randint(0, 3), dice.choice((0.002, 0.02))
    sizes = harness.policy.row_sizes if harness.policy.rows == "asked" else (0,)
    ages: dict[int, int] = {}
    while count or harness.open:
        while count and dice.random() < 0.4:
            prompt, most = _request(dice, harness, longest)
            # Sometimes several at once that begin alike.
            for _ in range(min(count, dice.choice((1, 1, 1, 4)))):
                harness.add(prompt, most, dice.choice(sizes), dice.random() < 0.2)
                prompt = [*prompt, dice.randrange(3)][: longest - most + 1]
                count -= 1
        if harness.open and dice.random() < 0.05:
            harness.end(dice.choice(list(harness.open)))
        if harness.open and dice.random() < 0.1:
            request = dice.choice(list(harness.open))
            harness.hold(request, not harness.open[request].held and dice.random() < 0.4)
        if dice.random() < risk:
            harness.lose()
        if dice.random() < 0.002:
            harness.replace()
            ages.clear()
        active = [number for number, asked in harness.open.items() if not asked.held]
        oldest = min(active, default=0)
        late = frozenset(n for n, asked in harness.open.items() if asked.one_by_one and dice.random() < 0.2)
        plan = harness.plan(late)
        assert plan is not None or harness.under_way or not active or late
        ages[oldest] = ages.get(oldest, 0) + bool(active)
        # A read of 40 tokens, as many steps, and as many again after each loss of the device.
        assert ages[oldest] < 1000, f"request {oldest} starves"
        while len(harness.under_way) > (0 if plan is None else ahead):
            harness.receive()
            if dice.random() < 0.1:
                break
    while harness.under_way:
        harness.receive()
    for pool in harness.pools:
        assert pool.free + pool.idle == pool.size
