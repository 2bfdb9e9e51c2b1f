"""What a step does, as a value: all that the device's programs need to know, and nothing of the model."""

import dataclasses
import json
from typing import Any, Self


@dataclasses.dataclass(frozen=True)
class Join:
    """A request takes a slot, whose tables are then all 0."""

    slot: int
    request: int
    drawn: tuple[int, ...] = ()  # its tokens so far, if it was set aside


@dataclasses.dataclass(frozen=True)
class TableEntry:
    """The page that a slot's table now has for a block of positions; 0 if it needs none any more."""

    pool: int  # of the slot's shard; the pools of all shards are numbered shard by shard
    slot: int
    index: int  # position // page
    page: int


@dataclasses.dataclass(frozen=True)
class Copy:
    """The first places of a page, copied to another of the same pool."""

    pool: int
    source: int
    target: int
    count: int


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one prompt in a call."""

    slot: int
    start: int  # index of its first token in the call's
    count: int
    position: int  # of its first token
    ends: bool  # whether the prompt ends here: the logits after its last token are the slot's


@dataclasses.dataclass(frozen=True)
class PrefillCall:
    """Pieces of prompts, one after another."""

    size: int  # tokens that the program takes for each shard; those after a shard's last piece are padding
    tokens: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """What one slot does in the steps of a decode call.

    In step i of the call, the slot's token is `given[i]`, or is drawn from its logits if i is at least `len(given)`. It
    belongs at `position + i`. If i is less than `feeds`, its keys and values are written there, and the logits after it
    become the slot's. In steps from `len(given) + draws` on, the row is padding.
    """

    slot: int
    position: int
    given: tuple[int, ...]  # tokens drawn earlier, whose keys and values were lost
    draws: int
    feeds: int  # len(given) + draws, or 1 less: a request's last token is not fed


@dataclasses.dataclass(frozen=True)
class DecodeCall:
    """Steps for some slots. A row's token is not known to the host until the call has run."""

    size: int  # rows that the program computes for each shard; those after a shard's last are padding
    steps: int
    rows: tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to dispatch at once: first joins and table entries, then copies, prefill calls in order, and decode.

    Plans are dispatched in the order of their numbers, to one stream of the device.

    Its JSON can be read in a log, is the same for any language, and runs nothing when it is loaded. It has changes of
    tables, not tables, so it is as small as what the step does: a row of a decode step needs about 40 bytes, whatever
    the length of its sequence.
    """

    number: int
    joins: tuple[Join, ...]
    tables: tuple[TableEntry, ...]
    copies: tuple[Copy, ...]
    prefill: tuple[PrefillCall, ...]
    decode: DecodeCall | None

    @property
    def draws(self) -> bool:
        """Whether it draws any tokens, which the scheduler then waits for."""
        return self.decode is not None and any(row.draws for row in self.decode.rows)

    def to_json(self) -> str:
        """The plan as a JSON array of its fields, in order."""
        return json.dumps(_plain(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The plan that `to_json` wrote."""
        number, joins, tables, copies, prefill, decode = json.loads(text)
        return cls(
            number=number,
            joins=tuple(Join(slot, request, tuple(drawn)) for slot, request, drawn in joins),
            tables=tuple(TableEntry(*each) for each in tables),
            copies=tuple(Copy(*each) for each in copies),
            prefill=tuple(
                PrefillCall(size, tuple(tokens), tuple(Piece(*each) for each in pieces))
                for size, tokens, pieces in prefill
            ),
            decode=None if decode is None else _decode_call(*decode),
        )


def _decode_call(size: int, steps: int, rows: list[Any]) -> DecodeCall:
    return DecodeCall(
        size,
        steps,
        tuple(Row(slot, position, tuple(given), draws, feeds) for slot, position, given, draws, feeds in rows),
    )


def _plain(value: Any) -> Any:
    """Dataclasses and tuples as lists."""
    if dataclasses.is_dataclass(value):
        return [_plain(getattr(value, field.name)) for field in dataclasses.fields(value)]
    return [_plain(each) for each in value] if isinstance(value, tuple) else value
