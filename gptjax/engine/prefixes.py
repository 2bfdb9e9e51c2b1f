"""Prefix reuse: what slots still hold of earlier prompts, so that a conversation's next turn continues from there."""

import dataclasses
from collections.abc import Sequence

from gptjax.layers.cache import Tail


@dataclasses.dataclass(frozen=True)
class Held:
    """A prompt's beginning, up to its last whole chunk, whose keys and values a slot's cache holds.

    Full-attention layers keep them until another prompt is begun in the slot, since decoding writes after them. Sliding
    layers have used their pages again meanwhile, so the last ones were copied right after the chunk was read.
    """

    token_ids: tuple[int, ...]
    tail: Tail
    since: int  # a counter: the larger, the later it was put there


class Prefixes:
    """What each of an engine's slots holds, whether busy or free."""

    def __init__(self, slots: int):
        self._held: list[Held | None] = [None] * slots
        self._clock = 0

    def put(self, slot: int, token_ids: Sequence[int], tail: Tail | None) -> None:
        """Records the prompt's beginning that replaced a slot's content; without its tail it is of no use."""
        self._clock += 1
        self._held[slot] = None if tail is None else Held(tuple(token_ids), tail, self._clock)

    def find(self, prompt_ids: Sequence[int]) -> tuple[int, Held] | None:
        """The slot that holds most of a prompt, but not all: at least one token must be read to continue."""
        found = [
            (slot, held)
            for slot, held in enumerate(self._held)
            if held is not None
            and len(held.token_ids) < len(prompt_ids)
            and tuple(prompt_ids[: len(held.token_ids)]) == held.token_ids
        ]
        return max(found, key=lambda each: len(each[1].token_ids), default=None)

    def least(self, free: Sequence[int], prompt_ids: Sequence[int]) -> int:
        """The free slot whose content is least useful: the prompt's own beginning, or nothing, or the oldest."""
        found = self.find(prompt_ids)
        if found is not None and found[0] in free:
            return found[0]
        return min(free, key=lambda slot: 0 if (held := self._held[slot]) is None else held.since)
