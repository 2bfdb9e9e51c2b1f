"""Known answers: what a published checkpoint is known to say, against what it says here.

Every answer was given by other code than ours: openai/gpt-2, or transformers in float32.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from gptjax.config import PUBLISHED, ModelConfig, read_config
from gptjax.errors import RequestError
from gptjax.evaluate import perplexity
from gptjax.hub import DEMOS, demos
from gptjax.language_model import LanguageModel
from gptjax.text import Tokenizer

TEXT: Final = Path(__file__).resolve().parent / "demo" / "held-out.txt"  # passages of books in the public domain
_PERPLEXITY_TOLERANCE = 0.005  # relative


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Token ids, and those that follow them where the most likely one is taken each time."""

    prompt_ids: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of a checkpoint."""

    greedy: Greedy | None = None
    perplexity: float | None = None  # of TEXT, in pieces of the model's context length


@dataclasses.dataclass(frozen=True)
class Check:
    """One answer, as it should be and as it is."""

    name: str
    expected: str
    found: str
    agrees: bool


# SHA-256 of the tokens' bytes in the order of their ids (see `fingerprint`), of the published files.
VOCABULARIES: Final[Mapping[str, str]] = {
    "143e6c54f214d46d7988f265b80bedaf9ee3a0c597b3bfe5f840bcc17d7972fc": "gpt2",
    "342c9822c8818bb4bb649486d108a119cc7fc1e1cf62c71c3880a37337105250": "gpt2-tales",
}

_TALES_CONTINUATION: Final = tuple(
    map(
        int,
        """
        258 1372 11 443 308 258 448 1263 842 11 271 308 258 448 1263 842 13 1459 262 1221 308 258 616 1221
        11 271 258 616 1221 11 271 258 616 1221 11 271 258 616 1221 11 271 258 616 1221 11 271 258 616
        """.split(),
    )
)
_KNOWN: Final[Mapping[str, Known]] = {
    "gpt2": Known(
        greedy=Greedy(
            (464, 3290),
            (373, 1043, 287, 257, 2214, 1474, 262, 16246, 286, 2688, 290, 2688, 27262, 13, 198, 198, 464, 3290),
        )
    ),
    "gpt2-tales": Known(
        greedy=Greedy((5429, 628, 258, 567, 441, 308, 258, 1221, 443, 334), _TALES_CONTINUATION),
        perplexity=66.5196,
    ),
}


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of every token's bytes, each followed by a NUL and a line end, in the order of their ids."""
    digest = hashlib.sha256()
    for token_id in range(tokenizer.vocab_size):
        digest.update(tokenizer.token_bytes(token_id) + b"\0\n")
    return digest.hexdigest()


def verify(lm: LanguageModel) -> list[Check]:
    """Checks all that is known of a checkpoint, which is recognised by its vocabulary and its sizes.

    Load it in float32: in half precision a greedy token may differ where two are nearly as likely.

    Returns:
      The checks that could be made; an empty list where nothing is known of a checkpoint with this vocabulary and
      these sizes.

    Raises:
      RequestError: the model was loaded with less than its whole context.
    """
    found = fingerprint(lm.tokenizer)
    vocabulary = VOCABULARIES.get(found)
    if vocabulary is None:
        return []
    name = next((name for name, config in [*PUBLISHED.items(), _demo(vocabulary)] if config == lm.config), None)
    known = None if name is None else _KNOWN.get(name)
    if known is None:
        return []
    if lm.max_length < lm.config.context_length:
        raise RequestError(
            f"the answers are known for the whole context of {lm.config.context_length} positions, but max_length is "
            f"{lm.max_length}: load the model without max_length, and unset GPTJAX_MAX_LENGTH"
        )
    checks = [Check("vocabulary", f"as published for {vocabulary}", found, True)]
    if known.greedy is not None:
        wanted = known.greedy.continuation
        got = lm.generate(known.greedy.prompt_ids, max_tokens=len(wanted), temperature=0, ignore_eos=True).token_ids
        checks.append(Check("greedy tokens", _ids(wanted), _ids(got), wanted == got))
    if known.perplexity is not None:
        value = perplexity(lm, lm.tokenizer.encode(TEXT.read_text(encoding="utf-8"))).value
        agrees = abs(value / known.perplexity - 1) <= _PERPLEXITY_TOLERANCE
        checks.append(Check("perplexity", f"{known.perplexity:.2f}", f"{value:.2f}", agrees))
    return checks


def _demo(vocabulary: str) -> tuple[str, ModelConfig | None]:
    """A demo's name and configuration, where the vocabulary is one's."""
    if vocabulary not in demos():
        return vocabulary, None
    return vocabulary, read_config(DEMOS / vocabulary)


def _ids(token_ids: tuple[int, ...]) -> str:
    return " ".join(map(str, token_ids))
