"""What the worker knows of a request: its tokens so far, and how it ends."""

import dataclasses

from gptjax.engine.request import Request, Token
from gptjax.server.ipc.events import Deliver, Failed, Finished, Ticket, Tokens


@dataclasses.dataclass(eq=False)
class Job:
    """A request on its way through the worker."""

    ticket: Ticket
    request: Request
    deliver: Deliver
    room: int  # the most tokens that it gets
    cancelled: bool = False
    number: int | None = None  # the engine's, while it has it
    began: float = 0.0  # when the engine took it
    cached: int = 0  # prompt tokens that were not read again
    count: int = 0  # tokens that were sent
    fresh: list[Token] = dataclasses.field(default_factory=list)  # tokens that were drawn since

    def add(self, token: Token) -> str | None:
        """Takes a token that was drawn. Returns why the request ends with it; None if it goes on."""
        self.fresh.append(token)
        if token.token_id in self.request.stop_ids:
            return "stop"
        return "length" if self.count + len(self.fresh) == self.room else None

    def take(self) -> Tokens:
        """The fresh tokens, which count as sent."""
        event = Tokens(tuple(self.fresh))
        self.count += len(self.fresh)
        self.fresh.clear()
        return event

    def end(self, how: Failed | str) -> Finished | Failed:
        """The last event."""
        return Finished(how, len(self.request.prompt_ids), self.cached, self.count) if isinstance(how, str) else how
