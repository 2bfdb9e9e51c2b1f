"""The tokens around a text, as a part of tokenizer.json."""

from typing import Any, Final

Token = tuple[str, int]  # its content and its id
_TEXT: Final = {"Sequence": {"id": "A", "type_id": 0}}


def post_processor(before: Token | None, after: Token | None) -> dict[str, Any] | None:
    """The post_processor that puts one token before a text and one after it; None for neither."""
    around = dict(token for token in (before, after) if token is not None)
    first, last = ([] if t is None else [{"SpecialToken": {"id": t[0], "type_id": 0}}] for t in (before, after))
    if not around:
        return None
    return {
        "type": "TemplateProcessing",
        "single": [*first, _TEXT, *last],
        "pair": [_TEXT, _TEXT],
        "special_tokens": {text: {"id": text, "ids": [number], "tokens": [text]} for text, number in around.items()},
    }
