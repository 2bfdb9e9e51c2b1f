"""What the slots still hold of prompts that were read into them, so that a conversation's next turn starts there."""

import dataclasses
from collections.abc import Sequence

from gptjax.engine.steps import Rings


@dataclasses.dataclass(frozen=True)
class Held:
    """The beginning of a prompt, to its last whole chunk, of which a slot's cache holds the keys and values.

    Layers that see all positions hold them as long as no other prompt is put into the slot: decoding writes beyond
    them. A sliding layer's ring has gone on meanwhile, so it was copied when the chunk had been read.
    """

    token_ids: tuple[int, ...]
    rings: Rings
    since: int  # counts up: the larger, the later it was put there


class Prefixes:
    """What each of an engine's slots holds, busy or free."""

    def __init__(self, slots: int):
        self._held: list[Held | None] = [None] * slots
        self._clock = 0

    def put(self, slot: int, token_ids: Sequence[int], rings: Rings | None) -> None:
        """A prompt's beginning was put into a slot in place of what it held; without rings, nothing of use was."""
        self._clock += 1
        self._held[slot] = None if rings is None else Held(tuple(token_ids), rings, self._clock)

    def find(self, prompt_ids: Sequence[int]) -> tuple[int, Held] | None:
        """The slot that holds the most of a prompt, though not all of it: something must be read to go on from."""
        found = [
            (slot, held)
            for slot, held in enumerate(self._held)
            if held is not None
            and len(held.token_ids) < len(prompt_ids)
            and tuple(prompt_ids[: len(held.token_ids)]) == held.token_ids
        ]
        return max(found, key=lambda each: len(each[1].token_ids), default=None)

    def least(self, free: Sequence[int], prompt_ids: Sequence[int]) -> int:
        """The free slot whose content is missed least: the prompt's own beginning, or nothing, or the oldest."""
        found = self.find(prompt_ids)
        if found is not None and found[0] in free:
            return found[0]
        return min(free, key=lambda slot: 0 if (held := self._held[slot]) is None else held.since)
