"""Compares what a published checkpoint says here with its known answers.

Every answer comes from code other than ours: openai/gpt-2, or transformers in float32.
"""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Final

from gptjax.checkpoints.checkpoint import open_checkpoint
from gptjax.checkpoints.hub import demos
from gptjax.config import PUBLISHED, ModelConfig
from gptjax.diagnostics.perplexity import HELD_OUT, WINDOW, perplexity
from gptjax.errors import RequestError
from gptjax.language_model import LanguageModel
from gptjax.text import Tokenizer

_PERPLEXITY_TOLERANCE = 0.005  # relative


@dataclasses.dataclass(frozen=True)
class Greedy:
    """Token ids, and their greedy continuation."""

    prompt_ids: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Continued:
    """A text, and its greedy continuation."""

    prompt: str
    continuation: str


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known about a checkpoint."""

    greedy: Greedy | None = None
    continued: Continued | None = None
    perplexity: float | None = None  # of HELD_OUT, in pieces of the model's context length, at most 2048 tokens


@dataclasses.dataclass(frozen=True)
class Check:
    """One answer, expected and found."""

    name: str
    expected: str
    found: str
    agrees: bool


# SHA-256 of the published tokens' bytes in the order of their ids (see `fingerprint`).
VOCABULARIES: Final[Mapping[str, str]] = {
    "143e6c54f214d46d7988f265b80bedaf9ee3a0c597b3bfe5f840bcc17d7972fc": "gpt2",
    "342c9822c8818bb4bb649486d108a119cc7fc1e1cf62c71c3880a37337105250": "gpt2-tales",
    "778d21dd53317b287f765eda724d8d1ce7a6ec7759eaa5cb44ccfcc66c0e0c58": "gpt-oss-tales",
    "7f56b9913634a00f94b7d6ed565e45d5e4f59dbb6ff6a872bb20571e6f77dbf4": "gpt-oss-20b",  # and gpt-oss-120b
}

_GPT_OSS_TALES_CONTINUATION: Final = tuple(
    map(
        int,
        """
        463 258 473 842 11 271 258 473 842 11 443 334 258 616 869 288 430 11 271 334 258 616 869 1161 1987 13 198 1
        40 506 901 294 506 347 1341 288 311 382 367 262 634 975 13 198 1 40 506 347
        """.split(),
    )
)
_GPT2_TALES_CONTINUATION: Final = tuple(
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
        greedy=Greedy((5429, 628, 258, 567, 441, 308, 258, 1221, 443, 334), _GPT2_TALES_CONTINUATION),
        perplexity=66.5196,
    ),
    "gpt-oss-tales": Known(
        greedy=Greedy((5429, 628, 258, 567, 441, 308, 258, 1221, 443, 334), _GPT_OSS_TALES_CONTINUATION),
        perplexity=71.8342,
    ),
    # From transformers' integration tests, which took it from openai/gpt-oss's code, in bfloat16.
    "gpt-oss-20b": Known(
        continued=Continued("Roses are red, violets", " are blue, I love you, and I love you too."),
    ),
    "gpt-oss-120b": Known(
        continued=Continued("Roses are red, violets", " are blue,\nI am a language model, not"),
    ),
}


def fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 of every token's bytes in the order of their ids, each followed by a NUL and a newline."""
    digest = hashlib.sha256()
    for token_id in range(tokenizer.vocab_size):
        digest.update(tokenizer.token_bytes(token_id) + b"\0\n")
    return digest.hexdigest()


def verify(lm: LanguageModel) -> list[Check]:
    """Checks everything known about a checkpoint, which is recognised by its vocabulary and sizes.

    Load it in float32: in half precision a greedy token may differ when two are almost equally likely. Only GPT-OSS's
    answers are known in bfloat16.

    Returns:
      The checks; an empty list if nothing is known about a checkpoint with this vocabulary and these sizes.

    Raises:
      RequestError: `max_length` is too short for the known texts.
    """
    found = fingerprint(lm.tokenizer)
    vocabulary = VOCABULARIES.get(found)
    if vocabulary is None:
        return []
    name = next((name for name, config in [*PUBLISHED.items(), _demo(vocabulary)] if config == lm.config), None)
    known = None if name is None else _KNOWN.get(name)
    if known is None:
        return []
    window = min(lm.config.context_length, WINDOW)
    if known.perplexity is not None and lm.max_length < window:
        raise RequestError(
            f"the known answers need {window} positions, but max_length is {lm.max_length}: load the model "
            "without max_length, and unset GPTJAX_MAX_LENGTH"
        )
    checks = [Check("vocabulary", f"as published for {vocabulary}", found, True)]
    if known.greedy is not None:
        wanted = known.greedy.continuation
        got = lm.generate(known.greedy.prompt_ids, max_tokens=len(wanted), temperature=0, ignore_eos=True).token_ids
        checks.append(Check("greedy tokens", _ids(wanted), _ids(got), wanted == got))
    if known.continued is not None:
        wanted_text = known.continued.continuation
        tokens = len(lm.tokenizer.encode(wanted_text))
        text = lm.generate(known.continued.prompt, max_tokens=tokens, temperature=0, ignore_eos=True).text
        checks.append(Check("greedy text", repr(wanted_text), repr(text), text == wanted_text))
    if known.perplexity is not None:
        windowed = LanguageModel(lm.model, lm.params, tokenizer=lm.tokenizer, defaults=lm.defaults, max_length=window)
        value = perplexity(windowed, lm.tokenizer.encode(HELD_OUT.read_text(encoding="utf-8"))).value
        agrees = abs(value / known.perplexity - 1) <= _PERPLEXITY_TOLERANCE
        checks.append(Check("perplexity", f"{known.perplexity:.2f}", f"{value:.2f}", agrees))
    return checks


def _demo(vocabulary: str) -> tuple[str, ModelConfig | None]:
    """A vocabulary's name, and its configuration if it is a demo's."""
    if vocabulary not in demos():
        return vocabulary, None
    return vocabulary, open_checkpoint(vocabulary).config


def _ids(token_ids: tuple[int, ...]) -> str:
    return " ".join(map(str, token_ids))
