"""Faults in a checkpoint's files, and how to override them: loading, converting and describing agree."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import gptjax
from gptjax.cli import main
from gptjax.diagnostics.info import describe
from gptjax.errors import ConfigError, RequestError


@pytest.fixture
def copy(tmp_path: Path, demo: Path) -> Path:
    return Path(shutil.copytree(demo, tmp_path / "demo"))


def change(directory: Path, name: str, **values: Any) -> Path:
    path = directory / name
    raw = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(raw | values))
    return directory


def test_a_generation_config_blocks_generation_only(copy, capsys, monkeypatch):
    change(copy, "generation_config.json", num_beams=5)
    with gptjax.load(copy) as lm:
        assert lm.logits([1, 2]).shape == (2, 8192)
        for call in (lm.generate, lm.stream):
            with pytest.raises(ConfigError, match=r"num_beams.*\n.*generation_config=False \(--no-generation-config\)"):
                call("Once")
        with pytest.raises(ConfigError, match="num_beams"):
            lm.decode(lm.init_state())
    with gptjax.load(copy, generation_config=False) as lm:
        wanted = lm.generate("Once", max_tokens=3).token_ids
        assert lm.eos_ids == (8191,)
    with gptjax.load(copy, generation_config={"do_sample": True, "top_k": 1}) as lm:
        assert lm.generate("Once", max_tokens=3).token_ids == wanted
        assert lm.defaults.temperature == 1.0
    assert "num_beams" in describe(copy)["generation"]
    assert "num_beams" not in describe(copy, generation_config=False)["generation"]
    assert main(["generate", "Once", "-m", str(copy), "-n", "2"]) == 1
    assert "num_beams" in capsys.readouterr().err
    assert main(["generate", "Once", "-m", str(copy), "-n", "2", "--no-generation-config"]) == 0
    monkeypatch.setattr("logging.config.dictConfig", lambda config: None)
    assert main(["serve", "-m", str(copy)]) == 1, "a server would refuse every request"
    assert "num_beams" in capsys.readouterr().err


def test_an_end_that_is_no_token_is_refused_where_texts_are_to_end(copy):
    change(copy, "generation_config.json", eos_token_id="</s>")
    with gptjax.load(copy) as lm, pytest.raises(ConfigError, match="eos_token_id is '</s>'"):
        lm.generate([5])
    with gptjax.load(copy, generation_config={"eos_token_id": 8191}) as lm:
        assert lm.tokenizer.eos_ids == lm.eos_ids == (8191,)


def test_a_key_is_ignored_everywhere(copy, tmp_path, capsys):
    change(copy, "config.json", rotary_dim=64)
    commands: list[list[str]] = [
        ["generate", "Once", "-n", "1", "-m", str(copy)],
        ["info", str(copy)],
        ["perplexity", str(copy), "--max-length", "16", "--text", str(tmp_path / "text")],
        ["trace", str(copy), "--ids", "5"],
        ["convert", str(copy), str(tmp_path / "converted")],
    ]
    (tmp_path / "text").write_text("Once upon a time there was.")
    for command in commands:
        assert main(command) == 1
        assert "--ignore-config rotary_dim" in capsys.readouterr().err
        assert main([*command, "--ignore-config", "rotary_dim"]) == 0
        capsys.readouterr()
    with pytest.raises(ConfigError, match="has no rotary_dims to ignore"):
        gptjax.load(copy, ignore_config=["rotary_dims"])
    with pytest.raises(RequestError, match="ignore_config must be a list of names"):
        gptjax.load(copy, ignore_config="rotary_dim")
    # The destination lacks the key, so it need not be ignored again.
    assert "rotary_dim" not in json.loads((tmp_path / "converted" / "config.json").read_text())
    gptjax.load(tmp_path / "converted").close()


def test_a_thousand_layers_are_refused_at_once(monkeypatch):
    """A model that fits nowhere: its memory is computed, not traced layer by layer."""
    from gptjax.config import PUBLISHED, config_from_json
    from gptjax.engine import memory
    from gptjax.models import registry

    raw = PUBLISHED["gpt-oss-20b"].to_json() | {"num_hidden_layers": 1024, "layer_types": None}
    model = registry.build(config_from_json(raw))
    device = gptjax.support.runtime.device_memory()
    traced = mock.Mock(wraps=memory.steps.init_state)
    monkeypatch.setattr(memory.steps, "init_state", traced)
    assert "needs" in str(memory.shortfall(model, batch=1, max_length=4096, has=1 << 34, device=device))
    traced.assert_not_called()


def test_a_prompt_gets_what_the_tokenizer_puts_around_texts(copy):
    parts = [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [8191], "tokens": ["<|endoftext|>"]}}
    template = {"type": "TemplateProcessing", "single": parts, "pair": [*parts, *parts], "special_tokens": special}
    with gptjax.load(copy) as lm:
        plain = lm.tokenizer.encode("Once")
        wanted = lm.generate([8191, *plain], max_tokens=4).token_ids
        written = lm.generate("<|endoftext|>Once", special=True, max_tokens=4)
        assert (written.token_ids, written.usage.prompt_tokens) == (wanted, 1 + len(plain))
        assert lm.generate("<|endoftext|>Once", max_tokens=1).usage.prompt_tokens > 1 + len(plain)
        with pytest.raises(RequestError, match="special must be true or false, found 1"):
            lm.generate("Once", special=1)
    change(copy, "tokenizer.json", post_processor=template)
    with gptjax.load(copy) as lm:
        assert lm.tokenizer.encode("Once") == plain
        assert lm.generate("Once", max_tokens=4).token_ids == wanted
        twice = lm.generate("<|endoftext|>Once", special=True, max_tokens=4)
        assert twice.usage.prompt_tokens == 1 + len(plain) and twice.token_ids == wanted


def test_an_end_of_text_that_the_model_does_not_have_ends_nothing(copy):
    """As every GPT-2 has that was trained from scratch with transformers' default ids and a small vocabulary."""
    change(copy, "generation_config.json", eos_token_id=[99999999, 8191])
    with gptjax.load(copy) as lm:
        assert lm.eos_ids == (8191,)
        assert len(lm.generate([5], max_tokens=2).token_ids) == 2
    assert "the model has no token 99999999" in describe(copy)["generation"]
