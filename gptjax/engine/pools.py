"""How many pages an engine's pools need."""

from collections.abc import Sequence

from gptjax.layers.cache import tail_pages
from gptjax.scheduling.policy import Policy


def pages_of_pools(windows: Sequence[int | None], *, max_length: int, policy: Policy) -> tuple[int, ...]:
    """Enough for all slots to hold `max_length` positions each.

    A layer with a window needs its last positions and those of a call. To go on from earlier prompts, as many more
    windows are kept as there are slots.

    Args:
      windows: the kinds of layers: see `layers.cache.kinds`.

    Returns:
      The pages of each kind's pool, with page 0.
    """
    counts = []
    for window in windows:
        count = policy.pages(max_length)
        if window is not None:
            count = min(count, policy.pages_across(window - 1 + max(policy.chunk + 1, policy.steps)))
            count += tail_pages(window) if policy.reuse else 0
        counts.append(1 + policy.slots * count)
    return tuple(counts)
