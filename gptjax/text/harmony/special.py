"""The special tokens that harmony is written with."""

from collections.abc import Mapping

from gptjax.errors import RequestError
from gptjax.text.tokenizer import Tokenizer

START = "<|start|>"
"""Begins a message's header."""
CHANNEL = "<|channel|>"
CONSTRAIN = "<|constrain|>"
"""Precedes a content type that sampling is constrained to."""
MESSAGE = "<|message|>"
"""Ends the header; the text follows."""
END = "<|end|>"
"""Ends a message; the next one may follow."""
CALL = "<|call|>"
"""Ends a message that calls a tool, and the turn."""
RETURN = "<|return|>"
"""Ends the final message, and the turn. In a prompt's history, `END` takes its place."""

_REQUIRED = (START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN)


def missing_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    """The special tokens of harmony that a tokenizer lacks; empty if its model can speak harmony."""
    return tuple(token for token in _REQUIRED if token not in tokenizer.special_ids)


def special_ids(tokenizer: Tokenizer) -> Mapping[str, int]:
    """The id of each special token. Raises RequestError if one of harmony's is missing."""
    missing = missing_tokens(tokenizer)
    if missing:
        raise RequestError(
            f"the tokenizer lacks harmony's special tokens {', '.join(missing)}: use a GPT-OSS model, or give this "
            "one a plain prompt instead of a conversation"
        )
    return tokenizer.special_ids
