"""`truncation: "auto"`: a conversation too long for the model loses its beginning."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from gptjax.errors import CapacityError, GptjaxError
from gptjax.server.generation.served import Served
from gptjax.text.chat_formats import ChatOptions

Messages = Sequence[dict[str, Any]]
_PART: Final = 4  # of the context: what is left for an answer without a limit of its own
_INSTRUCTIONS: Final = ("system", "developer")


def fitting(messages: Messages, how: ChatOptions, served: Served, max_tokens: int | None) -> list[int]:
    """The places of the messages that are kept: all if they fit, otherwise as many of the last as leave room to answer.

    That room is `max_tokens`, but at most half of the context; without it a quarter.
    """

    def fits(some: Messages, most: int) -> bool:
        if served.least_tokens([list(some), list(how.tools)])[1] > most:
            return False
        try:
            served.chat().render(some, served.text(), how, max_length=most)
        except CapacityError:
            return False
        except GptjaxError:  # whatever it is, it is reported when the prompt is made
            return True
        return True

    longest = served.max_length
    if fits(messages, longest):
        return list(range(len(messages)))
    room = longest // _PART if max_tokens is None else min(max_tokens, longest // 2)
    return last_turns(messages, lambda some: fits(some, longest - room))


def last_turns(messages: Messages, fits: Callable[[Messages], bool]) -> list[int]:
    """The places of as many turns at the end as fit, and of all instructions.

    A turn begins with a user's message that no call waits across, so results keep their calls. The last one is kept
    even if it does not fit.
    """
    begins = list(_begins(messages))
    if not begins:
        return list(range(len(messages)))
    low, high = 0, len(begins) - 1
    while low < high:
        middle = (low + high) // 2
        if fits([messages[place] for place in _kept(messages, begins[middle])]):
            high = middle
        else:
            low = middle + 1
    return _kept(messages, begins[low])


def _begins(messages: Messages) -> Iterator[int]:
    """The places where turns begin."""
    results = {message["tool_call_id"]: place for place, message in enumerate(messages) if message["role"] == "tool"}
    awaited = -1  # the last result of the calls so far
    for place, message in enumerate(messages):
        awaited = max([awaited, *(results.get(call["id"], -1) for call in message.get("tool_calls", ()))])
        if message["role"] == "user" and awaited < place:
            yield place


def _kept(messages: Messages, begin: int) -> list[int]:
    return [place for place, message in enumerate(messages) if place >= begin or message["role"] in _INSTRUCTIONS]
