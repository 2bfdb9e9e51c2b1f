"""The command line: `gptjax generate | info | convert`."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from gptjax import __version__
from gptjax.errors import GptjaxError

_DESCRIPTION = "GPT-2 in JAX: from a Hugging Face checkpoint to text."
_MODEL_HELP = (
    "a demo (gpt2-tales, the default), a directory (a Hugging Face checkpoint, or one that `gptjax convert` wrote), or "
    "a Hub id such as openai-community/gpt2"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns the exit status: 0, 1 for an error that is told, 2 for wrong usage, 130 for Ctrl-C."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    if argv is None and args.command == "convert":
        # A process of its own, which needs no accelerator and must not take the memory of one. Read by JAX's import.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except GptjaxError as error:
        print(f"gptjax: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has what it wanted. Keep Python from complaining while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gptjax",
        description=_DESCRIPTION,
        epilog='Try: gptjax generate "Once upon a time"',
    )
    parser.add_argument("--version", action="version", version=f"gptjax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    _add_generate(commands)
    _add_info(commands)
    _add_convert(commands)
    return parser


def _add_command(commands: Any, name: str, run: Any, *, summary: str, epilog: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float32 on a CPU, else bfloat16)")
    parser.add_argument("--max-length", type=int, metavar="N", help="positions of a sequence (default: all there are)")


def _add_generate(commands: Any) -> None:
    parser = _add_command(
        commands,
        "generate",
        _generate,
        summary="continue a prompt",
        epilog="""examples:
  gptjax generate "Once upon a time"
  gptjax generate "It was a dark" --model ./my-gpt2 --temperature 0.8 --top-p 0.95 --seed 1
  cat prompt.txt | gptjax generate --json > result.json""",
    )
    parser.add_argument(
        "prompt", nargs="?", help="the text to continue; left out, or -, it is read from standard input"
    )
    parser.add_argument("-m", "--model", help=_MODEL_HELP)
    _add_model_options(parser)
    parser.add_argument("-n", "--max-tokens", type=int, metavar="N", help="tokens to generate, at most (default: 256)")
    parser.add_argument("-t", "--temperature", type=float, metavar="T", help="0 takes the most likely token, always")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the fewest tokens whose probability reaches P"
    )
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="draw from tokens at least P times as likely as the best"
    )
    parser.add_argument("--repetition-penalty", type=float, metavar="R", help="above 1 discourages what stands already")
    parser.add_argument("--presence-penalty", type=float, metavar="A", help="taken off each token that was generated")
    parser.add_argument("--frequency-penalty", type=float, metavar="A", help="taken off for each time it was")
    parser.add_argument("--seed", type=int, metavar="N", help="makes a draw repeatable")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be given again")
    parser.add_argument("--ignore-eos", action="store_true", default=None, help="go on past the end-of-text token")
    parser.add_argument(
        "--top-logprobs", type=int, metavar="N", help="with --json: the N most likely tokens at each place"
    )
    parser.add_argument("--echo", action="store_true", help="print the prompt before its continuation")
    parser.add_argument("--json", action="store_true", help="print the whole result as one JSON object instead")
    parser.add_argument("--stats", action="store_true", help="tell the speed on standard error afterwards")


def _add_info(commands: Any) -> None:
    parser = _add_command(
        commands,
        "info",
        _info,
        summary="tell what a checkpoint is and what memory it needs",
        epilog="examples:\n  gptjax info gpt2-tales\n  gptjax info ./my-gpt2 --tensors --dtype bfloat16",
    )
    parser.add_argument("model", nargs="?", help=_MODEL_HELP)
    _add_model_options(parser)
    parser.add_argument("--max-batch", type=int, default=1, metavar="N", help="rows computed together (default: 1)")
    parser.add_argument("--tensors", action="store_true", help="list every weight with its shape")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_convert(commands: Any) -> None:
    from convert.__main__ import add_arguments, run

    examples = "examples:\n  gptjax convert ./gpt2 ./gpt2-jax\n  gptjax convert gpt2 ./gpt2-bf16 --dtype bfloat16"
    summary = "turn a Hugging Face checkpoint into one that loads fast"
    add_arguments(_add_command(commands, "convert", run, summary=summary, epilog=examples))


def _generate(args: argparse.Namespace) -> int:
    from gptjax.api import DEFAULT_MODEL, load
    from gptjax.engine.options import GenerateOptions
    from gptjax.errors import RequestError

    prompt = args.prompt
    if prompt is None or prompt == "-":
        if prompt is None and sys.stdin.isatty():
            raise RequestError('there is no prompt; try: gptjax generate "Once upon a time"')
        prompt = _read_stdin()
    options = {name: getattr(args, name) for name in GenerateOptions.__annotations__ if hasattr(args, name)}
    options = {name: value for name, value in options.items() if value is not None}
    lm = load(args.model or DEFAULT_MODEL, dtype=args.dtype, max_length=args.max_length)
    chunks, completion = lm.stream(prompt, **options), None
    if args.echo and not args.json:
        sys.stdout.write(prompt)
    for chunk in chunks:
        completion = chunk.completion
        if not args.json:
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
    assert completion is not None  # the last chunk has it
    if args.json:
        print(json.dumps({"prompt": prompt, **dataclasses.asdict(completion)}, ensure_ascii=False))
    else:
        print()
    if args.stats:
        rate = completion.timings.tokens_per_second(completion.usage.completion_tokens)
        first = completion.timings.time_to_first_token
        print(f"{completion.usage}, first token after {first:.3f} s, then {rate:.1f} tokens/s", file=sys.stderr)
    if completion.error is not None:
        print(f"gptjax: {completion.error}", file=sys.stderr)
        return 1
    return 0


def _read_stdin() -> str:
    from gptjax.errors import RequestError

    try:
        # A file's or echo's last line end is not meant as part of the prompt.
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RequestError(f"standard input is not UTF-8 text ({error}); convert it first, as with iconv") from None


def _info(args: argparse.Namespace) -> int:
    from gptjax.api import DEFAULT_MODEL
    from gptjax.info import describe, describe_tensors
    from gptjax.memory import readable

    name = args.model or DEFAULT_MODEL
    facts = describe(name, dtype=args.dtype, max_length=args.max_length, max_batch=args.max_batch)
    tensors = describe_tensors(name, dtype=args.dtype) if args.tensors else {}
    if args.json:
        print(json.dumps({**facts, **({"tensors": tensors} if args.tensors else {})}, ensure_ascii=False))
        return 0
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        print(f"{key.removesuffix('_bytes'):{width}}  {readable(value) if key.endswith('_bytes') else value}")
    for path, value in tensors.items():
        print(f"{path}  {value}")
    return 0
