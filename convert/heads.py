"""A table's ends: the embedding, the language model's head, and heads of other models that a checkpoint can have."""

from collections.abc import Collection, Sequence
from typing import Final

from convert.rules import Copy, Ignored, Refused, Rule, Table

_HEAD: Final = "lm_head.weight"
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


def with_ends(
    body: Sequence[Rule],
    names: Collection[str],
    *,
    embedding: str,
    tied: bool,
    model: str,
    buffers: Sequence[Ignored] = (),
) -> Table:
    """The table of a language model as transformers saves it.

    A tied model's one tensor can be stored under either name: transformers keeps the embedding's, safetensors'
    `save_model` the alphabetically first, lm_head.weight.

    Args:
      body: the rules for everything but the embedding and the head.
      names: all tensor names of the checkpoint.
      embedding: the embedding's name.
      tied: whether the head is the embedding.
      model: transformers' class.
      buffers: tensors that are not weights.
    """
    ignored, refused = _other_heads(names, model)
    ignored = (*buffers, *ignored)
    token_embedding = Rule(embedding, "token_embedding")
    if not tied:
        fix = "or set tie_word_embeddings to true in config.json if the model was trained with a tied head"
        head = Rule(_HEAD, "head_embedding", if_missing=fix)
        return Table((token_embedding, *body, head), ignored, refused=refused)
    spellings = {embedding.replace("[transformer.]", prefix) for prefix in ("", "transformer.")}
    if _HEAD in names and not spellings & set(names):
        return Table((Rule(_HEAD, "token_embedding"), *body), ignored, refused=refused)
    otherwise = "the head is not tied to the embedding: set tie_word_embeddings to false in config.json"
    return Table((token_embedding, *body), ignored, (Copy(_HEAD, embedding, otherwise),), refused)


def _other_heads(names: Collection[str], model: str) -> tuple[tuple[Ignored, ...], tuple[Refused, ...]]:
    """The rows for heads to ignore, and for heads that show that this is not a language model.

    With `lm_head.weight` among the names this is a language model, whatever else it has.
    """
    extra = tuple(Ignored(name, reason) for name, reason in _EXTRA.items())
    if _HEAD in names:
        return (*extra, *(Ignored(name, f"a head that {does}") for name, does in _INSTEAD.items())), ()
    fix = (
        f"and {_HEAD} is missing: this is not a language model; to use its body as one, save it with "
        f"transformers: {model}.from_pretrained(directory).save_pretrained(another_directory)"
    )
    return extra, tuple(Refused(name, f"is a head that {does}, {fix}") for name, does in _INSTEAD.items())
