"""The ids around a text, as a part of tokenizer.json."""

from typing import Any


def post_processor(before: int | None, after: int | None) -> dict[str, Any] | None:
    """The post_processor that puts one id before a text and one after it; None for neither."""
    names = {"before": before, "after": after}
    tokens = {
        name: {"id": name, "ids": [number], "tokens": [name]} for name, number in names.items() if number is not None
    }
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    first, last = ([{"SpecialToken": {"id": name, "type_id": 0}}] if name in tokens else [] for name in names)
    if not tokens:
        return None
    return {
        "type": "TemplateProcessing",
        "single": first + text + last,
        "pair": text + text,
        "special_tokens": tokens,
    }
