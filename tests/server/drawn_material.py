"""A model's turns, drawn at random among those that a request's grammar allows."""

import random

from tests.server.server_material import tokenizer
from tests.structured.walks import CLOSING, allowed, compiler


def drawing(name: str, seed: int = 0):
    """A script: tokens at random, of those that the request's grammar allows. Reasoning is short."""
    text, chance = tokenizer(name), random.Random(seed)
    marks = [number for token, number in text.special_ids.items() if token != "<|startoftext|>"]
    closing = [each for each in range(text.vocab_size) if text.token_bytes(each) in (*CLOSING, b"</think>", b"<")]

    def script(request):
        assert request.grammar is not None
        matcher = compiler(name).matcher(request.grammar, request.stop_ids)
        for _ in range(300):
            ids = allowed(matcher, name)
            ends = [each for each in ids if each in marks] or [each for each in ids if each in closing]
            token_id = chance.choice(ends if ends and chance.random() < 0.7 else ids)
            matcher.take(token_id)
            yield token_id

    return script
