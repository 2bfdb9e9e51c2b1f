"""Chat formats against the published templates, run by jinja2 as transformers runs them."""

import json
import re
from datetime import date
from pathlib import Path

import pytest

from gptjax.errors import RequestError
from gptjax.text import Tokenizer
from gptjax.text.chat_formats import FORMATS, ChatOptions
from gptjax.text.chat_formats.known import TEMPLATES, fingerprint
from tests.oracles.chat_cases import SPECIAL, Cases, for_template
from tests.text.chat_material import TEMPLATE_FILES, chat_tokenizer, template

jinja2 = pytest.importorskip("jinja2")
utils = pytest.importorskip("transformers.utils.chat_template_utils")

pytestmark = pytest.mark.oracle

# What each format has and demands, for the conversations.
KINDS = {
    "llama-2": {"alternates": True},
    "mistral-v0.1": {"alternates": True, "system": False},
    "mistral-v0.2": {"alternates": True, "system": False},
    "llama-3.1": {"calls": 1},
    "llama-3.2": {"calls": 1},
}
ENDS = {"bos_token": "<s>", "eos_token": "</s>"}
LLAMA3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
DEEPSEEK = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return chat_tokenizer(tmp_path_factory.mktemp("chat"), bos_token="<s>")


def rendered(file: str, messages, tools=None, **options) -> str:
    ends = LLAMA3 if file.startswith("llama-3") else DEEPSEEK if file.startswith("deepseek") else ENDS
    [text], _ = utils.render_jinja_template(
        conversations=[for_template(messages)],
        tools=tools or None,
        chat_template=template(file),
        add_generation_prompt=True,
        **ends,
        **options,
    )
    return text


def harmless(value):
    """The same without special tokens in texts."""
    text = json.dumps(value, ensure_ascii=False)
    for token in SPECIAL:
        text = text.replace(token, "x")
    return json.loads(text)


@pytest.mark.parametrize("file", sorted(TEMPLATE_FILES))
def test_forty_conversations_are_written_as_the_template_writes_them(tokenizer, file):
    known = FORMATS[TEMPLATES[fingerprint(template(file))]]
    kind = {"tools": "tools" in known.options} | KINDS.get(known.name, {})
    special = set(tokenizer.special_ids.values())
    with_special = with_tools = 0
    for seed in range(40):
        cases = Cases(seed, **kind)
        messages, tools = cases.conversation(), cases.offered()
        thinking = cases.random.choice([None, True, False]) if "enable_thinking" in known.options else None
        options = ChatOptions(tools=tools, enable_thinking=thinking)
        given = {} if thinking is None else {"enable_thinking": thinking}
        wanted = rendered(file, messages, tools, **given)
        ids = known.render(messages, tokenizer, options, max_length=100_000)
        assert tokenizer.decode(ids, special=True) == wanted
        messages, tools = harmless(messages), harmless(tools)
        plain = known.render(
            messages, tokenizer, ChatOptions(tools=tools, enable_thinking=thinking), max_length=100_000
        )
        assert plain == tokenizer.encode(rendered(file, messages, tools, **given), special=True)
        # Special tokens come from the format only, not from texts.
        assert [token for token in ids if token in special] == [token for token in plain if token in special]
        with_special += ids != plain
        with_tools += bool(tools)
    assert with_special > 3
    assert with_tools > 10 or not kind["tools"]


@pytest.mark.parametrize("file", sorted(TEMPLATE_FILES))
def test_conversations_without_a_user_are_written_so_or_refused(tokenizer, file):
    """Refused are those that the template refuses, or loses."""
    known = FORMATS[TEMPLATES[fingerprint(template(file))]]
    system, said = {"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "Hi."}
    for messages in ([system], [said], [system, said], [system, said, system]):
        try:
            ids = known.render(messages, tokenizer, ChatOptions(), max_length=1000)
        except RequestError:
            assert KINDS.get(known.name, {}).get("alternates")
            continue
        assert tokenizer.decode(ids, special=True) == rendered(file, messages)


@pytest.mark.parametrize("file", ["llama-3.1", "llama-3.2"])
def test_the_date_is_the_given_one(tokenizer, file):
    messages = [{"role": "user", "content": "Hi"}]
    known = FORMATS[file]
    for day in ("2025-06-28", "2024-02-05", "today"):
        ids = known.render(messages, tokenizer, ChatOptions(current_date=day), max_length=1000)
        spelled = (date.today() if day == "today" else date.fromisoformat(day)).strftime("%d %b %Y")
        assert tokenizer.decode(ids, special=True) == rendered(file, messages, date_string=spelled)


@pytest.mark.parametrize(
    ("file", "messages", "says"),
    [
        ("llama-2", ["user", "user"], r"messages\[1\] has the role user"),
        ("llama-2", ["system", "assistant", "user"], r"messages\[1\] has the role assistant"),
        ("llama-2", ["user", "assistant", "assistant", "user"], r"messages\[2\] has the role assistant"),
        ("mistral-v0.1", ["system", "user"], r"messages\[0\] has the role system"),
        ("mistral-v0.2", ["user", "user", "user"], r"messages\[1\] has the role user"),
        ("llama-3.1", ["user", "calls"], r"messages\[1\].tool_calls has 2 calls"),
        ("llama-3.2", ["system", "user", "calls"], r"messages\[2\].tool_calls has 2 calls"),
    ],
)
def test_what_a_template_refuses_is_refused(tokenizer, file, messages, says):
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    calls = {"role": "assistant", "content": "", "tool_calls": [{**call, "id": "1"}, {**call, "id": "2"}]}
    talk = [calls if role == "calls" else {"role": role, "content": "x"} for role in messages]
    with pytest.raises(jinja2.exceptions.TemplateError):
        rendered(file, talk)
    with pytest.raises(RequestError, match=says):
        FORMATS[file].render(talk, tokenizer, ChatOptions(), max_length=1000)


def test_the_files_are_those_that_the_table_knows():
    digests = {fingerprint(template(file)): file for file in TEMPLATE_FILES}
    assert set(digests) == set(TEMPLATES)
    readme = (Path(__file__).resolve().parents[1] / "data" / "chat_templates" / "README.md").read_text()
    assert set(re.findall(r"^\| ([\w.-]+)\.jinja", readme, flags=re.M)) == set(TEMPLATE_FILES)
