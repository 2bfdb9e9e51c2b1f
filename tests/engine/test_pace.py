"""How long a dispatch may be put off."""

from gptjax.engine.pace import Pace


def test_there_is_time_while_the_device_works_less_what_a_dispatch_takes():
    now = [0.0]
    pace = Pace(lambda: now[0])
    assert not pace.has_time
    for now[0] in (10.0, 20.0):
        pace.read()
    pace.begin()
    now[0] = 22.0
    pace.dispatched()
    found = []
    for now[0] in (25.0, 25.9, 26.1, 29.0):
        found.append(pace.has_time)
    assert found == [True, True, False, False]  # until 20 + 0.8 * 10 - 2


def test_a_step_that_took_long_is_not_what_the_next_ones_take():
    """A host that always uses its time: the interval shrinks to what the device needs, which is 4."""
    now, lengths = [0.0], []
    pace = Pace(lambda: now[0])
    now[0] = 20.0
    pace.read()
    for _ in range(12):
        start = now[0]
        while pace.has_time:
            now[0] += 0.01
        pace.begin()
        now[0] += 0.5
        pace.dispatched()
        now[0] = max(now[0], start + 4)
        pace.read()
        lengths.append(now[0] - start)
    assert lengths[0] > 15
    assert lengths[-1] < 4.1
