"""Texts that a grammar allows, drawn at random: no model is needed to see what can come out."""

import json
import random
from functools import cache
from pathlib import Path

import numpy as np

from gptjax.engine.settings import all_allowed
from gptjax.structured import Grammar
from gptjax.structured.matching import Compiler, Matcher
from gptjax.text import Tokenizer, load_tokenizer

_DEMO = Path(__file__).resolve().parents[2] / "gptjax" / "demo"
CLOSING = (b'"', b"}", b"]", b'"}', b'"]', b"0", b"1")  # or most texts would have no end


@cache
def tokenizer(name: str = "gpt2-tales") -> Tokenizer:
    return load_tokenizer(_DEMO / name)


@cache
def compiler(name: str = "gpt2-tales") -> Compiler:
    return Compiler(tokenizer(name), tokenizer(name).vocab_size)


@cache
def _closing(name: str) -> frozenset[int]:
    text = tokenizer(name)
    return frozenset(each for each in range(text.vocab_size) if text.token_bytes(each) in CLOSING)


def allowed(matcher: Matcher, name: str = "gpt2-tales") -> list[int]:
    words_1W = all_allowed(1, compiler(name).vocab_size)
    matcher.fill(words_1W[0])
    bits = np.unpackbits(words_1W.view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def walk(grammar: Grammar, seed: int, *, name: str = "gpt2-tales", most: int = 200) -> bytes | None:
    """A text that the grammar allows; None if it had not ended after `most` tokens."""
    text, chance = tokenizer(name), random.Random(seed)
    end = text.eos_ids[0]
    matcher = compiler(name).matcher(grammar, text.eos_ids)
    found = b""
    for _ in range(most):
        ids = allowed(matcher, name)
        assert matcher.failure is None
        assert ids and not (set(ids) - {end}) & set(text.special_ids.values())
        ends = [each for each in ids if each == end or each in _closing(name)]
        token_id = chance.choice(ends if ends and chance.random() < 0.4 else ids)
        if token_id == end:
            return found
        matcher.take(token_id)
        found += text.token_bytes(token_id)
    return None


def walked(grammar: Grammar, count: int) -> list:
    """The JSON of texts that ended."""
    found = [walk(grammar, seed) for seed in range(count)]
    return [json.loads(each) for each in found if each is not None]
