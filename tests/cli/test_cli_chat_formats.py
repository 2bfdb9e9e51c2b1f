"""`gptjax chat` with models that do not speak harmony."""

import json

import pytest

from gptjax.cli.chat_session import Session
from gptjax.errors import RequestError
from gptjax.text import Tokenizer
from gptjax.text.chat_formats import FORMATS
from tests.cli.chat_material import Scripted, say, texts
from tests.text.chat_material import chat_tokenizer

ENDS = {"smollm2": "<|im_end|>", "qwen3": "<|im_end|>", "llama-3.2": "<|eot_id|>", "llama-2": "</s>", "zephyr": "</s>"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return chat_tokenizer(tmp_path_factory.mktemp("chat"))


def session(tokenizer, name, *scripts, **settings) -> Session:
    model = Scripted(*scripts, tokenizer=tokenizer, chat_format=FORMATS[name])
    return Session(model, name, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ENDS)
def test_a_conversation(tokenizer, name, tmp_path):
    talk = session(tokenizer, name, f"It was night.{ENDS[name]}", f"Day.{ENDS[name]}", system="Be brief.")
    assert texts(talk.handle("What then?"))[0] == ("answer", "It was night.")
    assert texts(talk.handle("And then?"))[0] == ("answer", "Day.")
    assert [message["content"] for message in talk._lm.asked[1]] == [
        "Be brief.",
        "What then?",
        "It was night.",
        "And then?",
    ]
    raw = say(talk, "/raw all")
    assert raw.endswith(f"Day.{ENDS[name]}")
    assert "What then?" in raw
    file = tmp_path / "talk.json"
    say(talk, f"/save {file}")
    assert json.loads(file.read_text()) == {"model": name, "messages": talk.conversation}
    with pytest.raises(RequestError, match=f"the model's chat format, {name}, has no effort"):
        say(talk, "/effort low")


@pytest.mark.parametrize("name", ["smollm2", "qwen3", "llama-3.2"])
def test_raw_begins_with_the_last_message(tokenizer, name):
    talk = session(tokenizer, name, f"It was night.{ENDS[name]}", f"Day.{ENDS[name]}")
    list(talk.handle("What then?"))
    list(talk.handle("And then?"))
    first, raw = say(talk, "/raw").split("\n", 1)
    assert first.endswith("tokens before; /raw all shows them)")
    assert "What then?" not in raw
    assert raw.startswith(FORMATS[name].begin)
    assert "And then?" in raw


def test_thoughts_are_shown_apart_and_can_be_turned_off(tokenizer):
    script = "<think>\nHm, so.\n</think>\n\nYes.<|im_end|>"
    talk = session(tokenizer, "qwen3", script)
    assert texts(talk.handle("Well?"))[:2] == [("reasoning", "Hm, so."), ("answer", "Yes.")]
    talk = session(tokenizer, "qwen3", "Yes.<|im_end|>", enable_thinking=False)
    assert texts(talk.handle("Well?"))[0] == ("answer", "Yes.")
    assert talk._lm.thinking is False


@pytest.mark.parametrize("settings", [{"effort": "low"}, {"enable_thinking": False}])
def test_a_setting_that_the_format_does_not_have_is_refused(tokenizer, settings):
    with pytest.raises(RequestError, match="has no meaning in the chat format smollm2"):
        session(tokenizer, "smollm2", **settings)
