"""Heads that a checkpoint can have in addition to a language model's, or instead of it."""

from collections.abc import Collection
from typing import Final

from convert.rules import Ignored, Refused

_EXTRA: Final = {  # saved together with a language model's own head
    "multiple_choice_head.summary.weight": "of GPT2DoubleHeadsModel",
    "multiple_choice_head.summary.bias": "of GPT2DoubleHeadsModel",
    "v_head.summary.weight": "the value head that TRL trains with a language model",
    "v_head.summary.bias": "the value head that TRL trains with a language model",
}
_INSTEAD: Final = {
    "score.weight": "classifies texts",
    "classifier.weight": "classifies tokens",
    "classifier.bias": "classifies tokens",
    "qa_outputs.weight": "finds answers in a text",
    "qa_outputs.bias": "finds answers in a text",
}


def other_heads(names: Collection[str], model: str) -> tuple[tuple[Ignored, ...], tuple[Refused, ...]]:
    """The rows for heads to ignore, and for heads that show that this is not a language model.

    Args:
      names: all tensor names. With `lm_head.weight` among them this is a language model, whatever else it has.
      model: transformers' class for this kind of language model.
    """
    extra = tuple(Ignored(name, reason) for name, reason in _EXTRA.items())
    if "lm_head.weight" in names:
        return (*extra, *(Ignored(name, f"a head that {does}") for name, does in _INSTEAD.items())), ()
    fix = (
        "and lm_head.weight is missing: this is not a language model; to use its body as one, save it with "
        f"transformers: {model}.from_pretrained(directory).save_pretrained(another_directory)"
    )
    return extra, tuple(Refused(name, f"is a head that {does}, {fix}") for name, does in _INSTEAD.items())
