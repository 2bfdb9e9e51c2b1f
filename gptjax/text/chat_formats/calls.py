"""The tool calls of a turn, while the model writes them."""

from gptjax.text.chat_formats.interface import CallPart, ToolCall, new_call_id


class Calls:
    """Collects calls, and says what was added to them since it was last asked.

    White space alone counts as no arguments, and those are `{}`: clients parse them.

    Attributes:
      whole: the complete calls.
    """

    def __init__(self) -> None:
        self.whole: list[ToolCall] = []
        self._open: tuple[str, str] | None = None  # id and name
        self._held: list[str] = []  # white space before the arguments
        self._pieces: list[str] = []
        self._fresh: list[CallPart] = []

    def begin(self, name: str, call_id: str | None = None) -> None:
        """A call begins; the one before has ended."""
        self._open = call_id or new_call_id(), name
        self._held, self._pieces = [], []
        self._fresh.append(CallPart(len(self.whole), *self._open, "", begins=True))

    def add(self, text: str) -> None:
        """More of its arguments."""
        if not self._pieces and not text.strip():
            self._held.append(text)
        elif text:
            self._write("".join([*self._held, text]))
            self._held.clear()

    def end(self) -> None:
        """It is complete."""
        if self._open is None:
            return
        if not self._pieces:
            self._write("{}")
        self.whole.append(ToolCall(*self._open, "".join(self._pieces)))
        self._open = None

    def add_whole(self, call: ToolCall) -> None:
        """A call in one piece."""
        self.begin(call.name, call.id)
        self.add(call.arguments)
        self.end()

    def take(self) -> tuple[CallPart, ...]:
        """What was added, a part for each call, since this was last called."""
        if not self._fresh:
            return ()
        fresh, self._fresh = self._fresh, []
        return joined_parts(fresh)

    def _write(self, arguments: str) -> None:
        assert self._open is not None  # a call is open
        self._pieces.append(arguments)
        self._fresh.append(CallPart(len(self.whole), *self._open, arguments, begins=False))


def joined_parts(parts: list[CallPart]) -> tuple[CallPart, ...]:
    """The same with one part for each call."""
    found: dict[int, list[CallPart]] = {}
    for part in parts:
        found.setdefault(part.index, []).append(part)
    return tuple(
        CallPart(index, own[0].id, own[0].name, "".join([part.arguments for part in own]), begins=own[0].begins)
        for index, own in found.items()
    )
