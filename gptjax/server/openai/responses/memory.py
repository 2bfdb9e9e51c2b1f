"""What `/v1/responses` remembers of earlier requests: `store`, `previous_response_id` and item references."""

import dataclasses
import secrets
from collections.abc import Mapping
from typing import Any, Final

from gptjax.server.errors import ApiError, as_json, bad_request
from gptjax.server.generation.response_store import Item, ResponseStore, Stored, size_of
from gptjax.server.http.fields import Fields, check_text
from gptjax.server.http.sse import encode

_PREFIXES: Final = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}
_LONGEST_ID: Final = 64  # characters, as in OpenAI's API; a longer one is replaced
# The keys of an item that are kept unchanged.
_KEYS: Final[Mapping[str, tuple[str, ...]]] = {
    "message": ("role", "phase"),
    "reasoning": (),
    "function_call": ("call_id", "namespace", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
}


@dataclasses.dataclass(frozen=True)
class Kept:
    """What is stored with a response. (The request's parsed input would take many times the memory.)"""

    store: ResponseStore
    given: tuple[Item, ...]
    made: frozenset[str]  # the ids that items of the request got here

    def remember(self, response: Mapping[str, Any]) -> None:
        """Stores a complete response."""
        output = tuple(Item(item["id"], encode(item)) for item in response["output"])
        made = self.made | {item.id for item in output}
        self.store.add(response["id"], Stored(encode(response), self.given, output, made))


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a request continues, and whether it is remembered itself."""

    store: ResponseStore
    stores: bool
    previous: str | None
    earlier: tuple[Item, ...]  # of the previous responses
    given: Any  # `input`, with items in place of references to them

    @property
    def items(self) -> Any:
        """The whole input: a string, if nothing came earlier, or else items."""
        return self.store.parsed(self.earlier) + _listed(self.given) if self.earlier else self.given

    def kept(self) -> Kept | None:
        """What is to be stored, if anything is. The items have been read. Raises `ApiError` if they are too large."""
        if not self.stores:
            return None
        items, made, known = list(self.earlier), set(), {item.id for item in self.earlier}
        for given in _listed(self.given):
            whole = _whole(given)
            item_id = given.get("id")
            # Lists of items are read page by page, by their ids, so none is there twice.
            if not isinstance(item_id, str) or len(item_id) > _LONGEST_ID or item_id in known:
                item_id = f"{_PREFIXES[whole['type']]}_{secrets.token_hex(12)}"
                made.add(item_id)
            known.add(item_id)
            items.append(Item(item_id, encode({"id": item_id, **whole})))
        size = size_of(items)
        if size > self.store.longest:
            message = f"the conversation takes {size} bytes, and at most {self.store.longest} are stored"
            raise bad_request(f"{message}: send store: false, or begin a new one", "input", "too_large")
        return Kept(self.store, tuple(items), frozenset(made))


def read_memory(fields: Fields, store: ResponseStore) -> Memory:
    """Takes `store`, `previous_response_id` and `input`, of which only references are looked at. Raises `ApiError`."""
    stores = ("store" not in fields or fields.flag("store")) and store.keeps
    previous, given = fields.text("previous_response_id"), fields.take("input")
    earlier: tuple[Item, ...] = ()
    if previous is not None:
        found = store.get(previous)
        if found is None:
            message = f"previous response with id {as_json(previous)} not found: {_why(store)}"
            raise bad_request(message, "previous_response_id", "previous_response_not_found")
        earlier = found.given + found.output
        if isinstance(given, str):
            check_text(given, "input")
    return Memory(store, stores, previous, earlier, _resolved(given, store))


def not_found(response_id: str, store: ResponseStore) -> ApiError:
    """404 for a response that is not kept."""
    message = f"response with id {as_json(response_id)} not found: {_why(store)}"
    return ApiError(404, message, code="response_not_found")


def _why(store: ResponseStore) -> str:
    if not store.keeps:
        return "this server keeps no responses; to change that, start it with --store-responses"
    return "it was not stored, was deleted, or had to make room for newer ones"


def _listed(given: Any) -> list[Any]:
    """`input` as items."""
    if given is None:
        return []
    return given if isinstance(given, list) else [{"role": "user", "content": given}]


def _resolved(given: Any, store: ResponseStore) -> Any:
    """`input`, with items in place of references to them, which are short, however long the items."""
    if not isinstance(given, list):
        return given
    found, size = [], 0
    for index, item in enumerate(given):
        if _is_reference(item):
            stored = _referred_to(item, f"input[{index}]", store)
            size += size_of([stored])
            if size > store.longest:
                message = f"the items that input refers to take more than {store.longest} bytes together"
                raise bad_request(f"{message}: refer to fewer", "input", "too_large")
            found += store.parsed([stored])
        else:
            found.append(item)
    return found


def _is_reference(item: object) -> bool:
    """Whether it refers to an item. The type may be missing."""
    return isinstance(item, Mapping) and (
        item.get("type") == "item_reference" or (item.get("type") is None and set(item) in ({"id"}, {"id", "type"}))
    )


def _referred_to(reference: Mapping[str, Any], where: str, store: ResponseStore) -> Item:
    item_id = reference.get("id")
    found = store.item(item_id) if isinstance(item_id, str) else None
    if found is None:
        message = f"{where}: item with id {as_json(item_id)} not found: {_why(store)}"
        raise ApiError(404, f"{message}; send the item itself, or leave it out", param="input", code="item_not_found")
    return found


def _whole(item: Mapping[str, Any]) -> dict[str, Any]:
    """An item as lists of items have it, with what is read of it and no more; without its id."""
    kind = item.get("type", "message")
    found = {"type": kind, **{name: item[name] for name in _KEYS[kind] if item.get(name) is not None}}
    if kind == "message":
        found["content"] = _parts(item["content"], "output_text" if item["role"] == "assistant" else "input_text")
    elif kind == "reasoning":
        found |= _reasoning(item)
    elif kind == "function_call_output" and not isinstance(item["output"], str):
        found["output"] = _parts(item["output"], "input_text")
    if kind != "reasoning":
        found["status"] = "incomplete" if item.get("status") == "incomplete" else "completed"
    return found


def _reasoning(item: Mapping[str, Any]) -> dict[str, Any]:
    """The first field of a reasoning item that has any, which is the one that is read."""
    if content := item.get("content"):
        return {"summary": [], "content": _parts(content, "reasoning_text")}
    if encrypted := item.get("encrypted_content"):
        return {"summary": [], "encrypted_content": encrypted}
    return {"summary": _parts(item.get("summary") or [], "summary_text")}


def _parts(content: str | list[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """A content as parts of this type; a refusal is one of its own."""
    own: dict[str, Any] = {"annotations": []} if kind == "output_text" else {}
    parts = [{"type": kind, "text": content}] if isinstance(content, str) else content
    return [
        {"type": "refusal", "refusal": part["refusal"]}
        if part["type"] == "refusal"
        else {"type": kind, "text": part["text"], **own}
        for part in parts
    ]
