"""Errors on the command line name its options, not the arguments of Python functions that they stand for."""

import argparse

import pytest

from gptjax.cli import main
from gptjax.cli.wording import in_options


@pytest.fixture(scope="module")
def parser():
    made = argparse.ArgumentParser()
    for option in ("--max-length", "--max-batch", "--top-k", "--seed", "--effort", "--no-thinking", "--dtype"):
        made.add_argument("-x", option) if option == "--seed" else made.add_argument(option)
    made.add_argument("--chat-format")
    made.add_argument("--no-generation-config")
    return made


SAID = {
    "max_length is 9, but": "--max-length is 9, but",
    "load the model with a larger max_length if it can": "load the model with a larger --max-length if it can",
    "reasoning_effort is 'x'; expected one of low": "--effort is 'x'; expected one of low",
    "enable_thinking has no meaning here": "--no-thinking has no meaning here",
    "seed must be a whole number": "--seed must be a whole number",
    "give one seed for all": "give one seed for all",
    "top_k must be at least 0, found 'top_k'": "--top-k must be at least 0, found 'top_k'",
    "max_length=64 (--max-length 64) with max_batch=2 (--max-batch 2)": "--max-length 64 with --max-batch 2",
    'try dtype="bfloat16" (--dtype bfloat16)': "try --dtype bfloat16",
    "with generation_config=False (--no-generation-config)": "with --no-generation-config",
    "name one with --chat-format, or chat_format= in gptjax.load: chatml": "name one with --chat-format: chatml",
    # Other things of the same names, and options that this command does not have.
    "generation_config.json has settings:\n  top_k is -5": "generation_config.json has settings:\n  top_k is -5",
    "lm.max_length is 5": "lm.max_length is 5",
    "unknown option 'max_length'": "unknown option 'max_length'",
    "./max_length/seed must be a directory": "./max_length/seed must be a directory",
    "n_max_length_x": "n_max_length_x",
    "top_p must be 1": "top_p must be 1",
    "top_p=1 (--top-p 1)": "top_p=1 (--top-p 1)",
    "--tokenizer, or tokenizer= in gptjax.load": "--tokenizer, or tokenizer= in gptjax.load",
}


@pytest.mark.parametrize("message", SAID)
def test_messages(parser, message):
    assert in_options(message, parser) == SAID[message]


def test_a_command_without_options():
    bare = argparse.ArgumentParser(add_help=False)
    assert in_options("seed must be 1, max_length is 2", bare) == "seed must be 1, max_length is 2"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["info", "gpt2-tales", "--max-batch", "0"], "--max-batch must be a whole number of at least 1, found 0"),
        (["info", "gpt2-tales", "--max-length", "999"], "--max-length is 999, but the model has only 512 positions"),
        (["generate", "-m", "gpt2-tales", "a", "--max-length", "0"], "--max-length must be a whole number"),
    ],
)
def test_commands(command, said, capsys):
    assert main(command) == 1
    assert said in capsys.readouterr().err
