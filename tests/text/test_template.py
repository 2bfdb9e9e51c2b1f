"""The chat template of a checkpoint. Which file counts is transformers' rule; tests/oracle compares with it live."""

from pathlib import Path
from typing import Any

import pytest

from gptjax.errors import CheckpointError
from gptjax.text import load_tokenizer
from tests.text.text_material import demo_json, write_json

NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]


def template_of(directory: Path, **settings: Any) -> str | None:
    write_json(directory, "tokenizer_config.json", settings)
    return load_tokenizer(write_json(directory, "tokenizer.json", demo_json())).chat_template


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ("{{ bos_token }}", "{{ bos_token }}"),
        (NAMED, "plain"),
        ({"default": "plain", "tool_use": "tools"}, "plain"),
        (NAMED[:1], None),
        ([], None),
    ],
)
def test_template_of_tokenizer_config(tmp_path: Path, value: Any, expected: str | None) -> None:
    assert template_of(tmp_path, chat_template=value) == expected


def test_a_file_of_its_own_comes_first(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes("{{ 'é' }}\r\n".encode())
    assert template_of(tmp_path, chat_template="other") == "{{ 'é' }}\n"


def test_no_settings_no_template(tmp_path: Path) -> None:
    assert load_tokenizer(write_json(tmp_path, "tokenizer.json", demo_json())).chat_template is None


@pytest.mark.parametrize("wrong", [7, True, ["plain"], [{"name": "default"}], [{"name": [], "template": "a"}]])
def test_damaged_templates(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is damaged: chat_template"):
        template_of(tmp_path, chat_template=wrong)


def test_damaged_template_file(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is damaged"):
        template_of(tmp_path)
