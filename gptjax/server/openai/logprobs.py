"""Log-probabilities in the two forms of OpenAI's API: of completions, and of chat."""

from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.server.ipc.events import PromptScores
from gptjax.text import Tokenizer


def token_text(tokenizer: Tokenizer | None, token_id: int) -> str:
    r"""A token as a string: its text or, if its bytes are not text, a form like `bytes:\xe2\x80`."""
    if tokenizer is None:
        return f"token_id:{token_id}"
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class LegacyLogprobs:
    """The `logprobs` of a completion: parallel lists, an entry per token, offsets in characters of the whole text."""

    def __init__(self, tokenizer: Tokenizer | None, num_top: int) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._offset = 0

    def of_prompt(self, token_ids: Sequence[int], scores: PromptScores) -> dict[str, Any]:
        """Those of an echoed prompt. Its first token has none, since nothing precedes it."""
        found = self._lists()
        decoder = None if self._tokenizer is None else self._tokenizer.stream(special=True)
        for place, token_id in enumerate(token_ids):
            logprob, top = (None, None) if place == 0 else scores[place - 1]
            text = "" if decoder is None else decoder.push(token_id)
            self._add(found, token_id, text, logprob, None if top is None else dict(top))
        self._offset += 0 if decoder is None else len(decoder.finish())
        return found

    def of_tokens(self, tokens: Sequence[tuple[int, str, float, Mapping[int, float]]]) -> dict[str, Any]:
        """Those of generated tokens: (id, text that it completed, log-probability, the most likely)."""
        found = self._lists()
        for token_id, text, logprob, top in tokens:
            self._add(found, token_id, text, logprob, top)
        return found

    def _lists(self) -> dict[str, Any]:
        top: list[Any] | None = [] if self._num_top else None
        return {"tokens": [], "token_logprobs": [], "top_logprobs": top, "text_offset": []}

    def _add(
        self,
        found: dict[str, Any],
        token_id: int,
        text: str,
        logprob: float | None,
        top: Mapping[int, float] | None,
    ) -> None:
        found["tokens"].append(token_text(self._tokenizer, token_id))
        found["token_logprobs"].append(logprob)
        found["text_offset"].append(self._offset)
        if found["top_logprobs"] is not None:
            found["top_logprobs"].append(None if top is None or logprob is None else self._top(token_id, logprob, top))
        self._offset += len(text)

    def _top(self, token_id: int, logprob: float, top: Mapping[int, float]) -> dict[str, float]:
        """The most likely tokens, and the actual one; of two with the same text, the likelier."""
        found: dict[str, float] = {}
        for each, value in [*list(top.items())[: self._num_top], (token_id, logprob)]:
            found.setdefault(token_text(self._tokenizer, each), value)
        return found


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Joins consecutive legacy log-probabilities."""
    whole = dict(parts[0])
    for part in parts[1:]:
        whole = {
            name: None if values is None or part[name] is None else values + part[name]
            for name, values in whole.items()
        }
    return whole


def chat_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[tuple[int, float, Mapping[int, float]]]
) -> list[dict[str, Any]]:
    """The `logprobs.content` of a chat: an object per token, with its bytes and alternatives."""
    return [
        {
            **_entry(tokenizer, token_id, logprob),
            "top_logprobs": [_entry(tokenizer, each, value) for each, value in top.items()],
        }
        for token_id, logprob, top in tokens
    ]


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token_id)
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}
