"""--packed: the same words for every command, and what `load` gets of them."""

import logging.config

import pytest

from gptjax import api
from gptjax.cli import main
from gptjax.errors import RequestError

COMMANDS = {
    "generate": ["generate", "The king"],
    "chat": ["chat", "The king", "-m", "gpt-oss-tales"],
    "serve": ["serve"],
    "bench": ["bench"],
    "compare": ["compare"],
    "trace": ["trace"],
    "perplexity": ["perplexity"],
}


@pytest.fixture
def loaded(monkeypatch):
    """What `load_checkpoint` was given."""
    given = []

    def load_checkpoint(checkpoint, **settings):
        given.append(settings)
        raise RequestError("not loaded")

    monkeypatch.setattr(api, "load_checkpoint", load_checkpoint)
    monkeypatch.setattr(logging.config, "dictConfig", lambda config: None)  # it would keep this test's standard error
    return given


@pytest.mark.parametrize(
    ("words", "packed"), [([], None), (["--packed", "keep"], True), (["--packed", "expand"], False)]
)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command(loaded, command, words, packed):
    assert main([*COMMANDS[command], *words]) == 1
    assert [settings["packed"] for settings in loaded] == [packed]


@pytest.mark.parametrize("command", COMMANDS)
def test_other_words(command, capsys):
    with pytest.raises(SystemExit):
        main([*COMMANDS[command], "--packed", "yes"])
    assert "invalid choice: 'yes'" in capsys.readouterr().err


def test_the_servers_environment(loaded, monkeypatch, capsys):
    monkeypatch.setenv("GPTJAX_SERVE_PACKED", "keep")
    assert main(["serve"]) == 1 and loaded[0]["packed"] is True
    monkeypatch.setenv("GPTJAX_SERVE_PACKED", "yes")
    assert main(["serve"]) == 1
    assert "GPTJAX_SERVE_PACKED is 'yes'; expected one of keep, expand" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["bench", "--random", "gpt2"], ["bench", "--kernels"], ["bench", "--tune"], ["info", "--size", "gpt2"]]
)
def test_only_a_checkpoint_is_packed(command, capsys):
    assert main([*command, "--packed", "keep"]) == 1
    assert "--packed" in capsys.readouterr().err
