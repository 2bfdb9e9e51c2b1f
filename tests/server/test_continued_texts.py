"""A completion continues its prompt: the space that a SentencePiece token begins with stays, even at the start."""

import json

import pytest

from gptjax.text import load_tokenizer
from tests.server.server_material import complete, events, make
from tests.text.sentencepiece_material import llama2_json
from tests.text.text_material import write_json


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return load_tokenizer(write_json(tmp_path_factory.mktemp("text"), "tokenizer.json", llama2_json()))


@pytest.mark.parametrize("stream", [False, True])
def test_the_first_space_of_a_completion_stays(text, stream):
    tokens = text.encode("the king")
    assert text.token_bytes(tokens[0]).startswith(b" ") and text.decode(tokens) == "the king"
    response = complete(make(lambda _: tokens, text=text), stream=stream, max_tokens=len(tokens))
    choices = [event["choices"][0] for event in events(response)] if stream else response.json()["choices"]
    assert "".join(choice["text"] for choice in choices) == " the king", json.dumps(choices)
