"""The responses that clients may come back to, in memory: bounded by number and by bytes."""

import dataclasses
import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Set
from typing import Any, Final, NamedTuple

_OVERHEAD: Final = 400  # bytes that an item takes in memory besides its JSON


class Item(NamedTuple):
    """An item as JSON: parsed, it would take several times the memory."""

    id: str
    data: bytes


def size_of(items: Iterable[Item]) -> int:
    """Bytes of memory, at most: those of tiny items are mostly overhead."""
    return sum(len(item.data) + _OVERHEAD for item in items)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A response as JSON, and the conversation that led to it."""

    response: bytes
    given: tuple[Item, ...]  # what came before it, earlier responses included
    output: tuple[Item, ...]
    made: Set[str]  # the ids among these that the server gave for this response

    @property
    def size(self) -> int:
        """Bytes. Items that several responses share count for each, so that any may go without the others."""
        return len(self.response) + size_of(self.given) + size_of(self.output)


class ResponseStore:
    """Keeps the responses used last. Any number of threads may use it.

    Attributes:
      longest: bytes of a conversation that may be kept; who continues one has it parsed again.
    """

    def __init__(self, most: int, most_bytes: int, longest: int) -> None:
        """`most`: responses; 0 keeps none. `most_bytes`: of all."""
        self.longest = longest
        self._most = most
        self._most_bytes = most_bytes
        self._bytes = 0
        self._kept: OrderedDict[str, Stored] = OrderedDict()  # the one used last at the end
        self._items: dict[str, tuple[str, Item]] = {}  # by the item's id, with the id of its response
        self._lock = threading.Lock()
        self._parsing = threading.Lock()

    @property
    def keeps(self) -> bool:
        """Whether it keeps any."""
        return self._most > 0

    def add(self, response_id: str, stored: Stored) -> None:
        """Keeps a response, and drops others for which there is no room any more."""
        with self._lock:
            self._kept[response_id] = stored
            self._bytes += stored.size
            for item in (*stored.given, *stored.output):
                if item.id in stored.made:
                    self._items[item.id] = response_id, item
            while self._kept and (len(self._kept) > self._most or self._bytes > self._most_bytes):
                self._drop(next(iter(self._kept)))

    def get(self, response_id: str) -> Stored | None:
        """A response, if it is still kept."""
        with self._lock:
            return self._used(response_id)

    def item(self, item_id: str) -> Item | None:
        """An item that the server gave its id, if its response is still kept."""
        with self._lock:
            response_id, item = self._items.get(item_id, ("", None))
            self._used(response_id)
            return item

    def parsed(self, items: Iterable[Item]) -> list[Any]:
        """Items as objects. One thread at a time makes them, as the parser does not let others run meanwhile."""
        with self._parsing:
            return [json.loads(item.data) for item in items]

    def remove(self, response_id: str) -> bool:
        """Drops a response. Returns whether it was kept."""
        with self._lock:
            was_kept = response_id in self._kept
            if was_kept:
                self._drop(response_id)
            return was_kept

    def _used(self, response_id: str) -> Stored | None:
        if response_id not in self._kept:
            return None
        self._kept.move_to_end(response_id)
        return self._kept[response_id]

    def _drop(self, response_id: str) -> None:
        stored = self._kept.pop(response_id)
        self._bytes -= stored.size
        for item_id in stored.made:
            del self._items[item_id]
