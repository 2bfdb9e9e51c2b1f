"""The served model: its name, and how texts become its tokens, checked before megabytes are encoded."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

from gptjax.errors import GptjaxError
from gptjax.server.errors import ApiError, as_json, bad_request
from gptjax.server.ipc.events import PromptScores
from gptjax.server.ipc.settings import Facts
from gptjax.text import Tokenizer
from gptjax.text.bounded import Bounds
from gptjax.text.chat_formats import ChatFormat


@dataclasses.dataclass(frozen=True)
class Served(Facts):
    """The served model, and what is done with it here."""

    tokenizer: Tokenizer | None  # None: only token ids can be sent
    chat_format: ChatFormat | GptjaxError  # an error says why it cannot chat
    score: Callable[[Sequence[int], int], PromptScores]  # (prompt ids, number of alternatives); blocks
    memory_in_use: Callable[[], int]  # bytes on the device
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def text(self) -> Tokenizer:
        """The tokenizer. Raises `ApiError` if there is none."""
        if self.tokenizer is None:
            raise bad_request(f"the model {self.name!r} has no tokenizer: send a prompt of token ids", "prompt")
        return self.tokenizer

    def chat(self) -> ChatFormat:
        """How conversations are written. Raises `ApiError` for a model that cannot chat."""
        if isinstance(self.chat_format, GptjaxError):
            message = f"the model {self.name!r} is not a chat model, so use /v1/completions: {self.chat_format}"
            raise bad_request(message, "model", "model_not_chat")
        return self.chat_format

    def check_size(self, texts: object, param: str) -> None:
        """Raises `ApiError` if strings, in lists and objects, cannot fit: megabytes take a minute to encode."""
        characters, least = self.least_tokens(texts)
        if least > self.max_length:
            message = f"the prompt has {characters} characters, at least {least} tokens, but max_length is "
            raise bad_request(f"{message}{self.max_length}: shorten it", param, "context_length_exceeded")

    def least_tokens(self, texts: object) -> tuple[int, int]:
        """The characters of strings, in lists and objects, and the tokens that they have at least."""
        assert self.tokenizer is not None  # the caller has checked
        characters, left = 0, [texts]
        while left:
            value = left.pop()
            if isinstance(value, str):
                characters += len(value)
            elif isinstance(value, list | dict):
                left += value.values() if isinstance(value, dict) else value
        return characters, characters // self.tokenizer.longest_token

    def encode(self, text: str, *, special: bool) -> list[int]:
        """The ids of a prompt. Raises `ApiError` or `CapacityError` if it cannot fit, without encoding all of it."""
        tokenizer = self.text()
        self.check_size(text, "prompt")
        encode = functools.partial(tokenizer.encode, special=special)
        return tokenizer.prompt(Bounds(encode, self.max_length).joined(text), special=special)

    def turn_ends(self) -> tuple[int, ...]:
        """The tokens that end a turn of a conversation."""
        return tuple(dict.fromkeys((*self.eos_ids, *self.chat().stop_ids(self.text()))))

    def check_name(self, name: str | None) -> None:
        """Raises `ApiError` for another model's name; None means this one."""
        if name not in (None, self.name) and not any(_stands_for(alias, name) for alias in self.aliases):
            raise ApiError(
                404,
                f"unknown model {as_json(name)}; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )


def _stands_for(alias: str, name: str) -> bool:
    return name.startswith(alias[:-1]) if alias.endswith("*") else name == alias
