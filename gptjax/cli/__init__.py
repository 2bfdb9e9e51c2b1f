"""The command line, `gptjax COMMAND`: one module per command."""

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from gptjax._version import __version__
from gptjax.cli import (
    bench,
    bench_server,
    chat,
    compare,
    doctor,
    generate,
    info,
    perplexity,
    serve,
    validate_quant,
    verify,
)
from gptjax.cli.common import CommandParser, add_command
from gptjax.cli.wording import in_options
from gptjax.errors import GptjaxError
from gptjax.support.quoting import clean

_DESCRIPTION = "GPT-2, GPT-OSS, Llama, Mistral and Qwen in JAX: from a checkpoint or a GGUF file to text and chat."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit status: 0, 1 after an error message, 2 for wrong usage, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows "?"
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    if argv is None and args.command == "convert":
        # Its own process: needs no accelerator, and must not take the memory of one. JAX reads this on import.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except GptjaxError as error:
        print(f"gptjax: {clean(in_options(str(error), args.parser))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        if argv is None:  # in its own process: XLA may still be compiling, and tearing that down at exit crashes
            sys.stdout.flush()
            os._exit(130)
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has what it wanted. Keep Python from complaining while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"gptjax: standard output cannot be written ({error.strerror})", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gptjax",
        description=_DESCRIPTION,
        epilog='Try: gptjax generate "Once upon a time"',
    )
    parser.add_argument("--version", action="version", version=f"gptjax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=CommandParser)
    for command in (
        generate,
        chat,
        serve,
        info,
        doctor,
        compare,
        bench,
        bench_server,
        verify,
        perplexity,
        validate_quant,
    ):
        command.add(commands)
    _add_convert(commands)
    return parser


def _add_convert(commands: Any) -> None:
    from convert.__main__ import add_arguments, run

    examples = """examples:
  gptjax convert ./gpt2 ./gpt2-jax
  gptjax convert gpt2 ./gpt2-bf16 --dtype bfloat16
  gptjax convert gpt2 ./gpt2-mxfp4 --quantize mxfp4=all
  gptjax convert --verify ./gpt2-jax
  gptjax convert ./gpt2-jax ./gpt2-again --to hf"""
    summary = "turn a Hugging Face checkpoint into one that loads fast, verify that, or export it again"
    add_arguments(add_command(commands, "convert", run, summary=summary, epilog=examples))
