"""`gptjax generate`."""

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from gptjax.cli.common import (
    MODEL_HELP,
    add_command,
    add_hosts,
    add_mesh,
    add_model_options,
    add_overrides,
    add_tokenizer,
    followed,
    joined,
    mesh,
    model_name,
    overrides,
    packed,
    read_stdin,
)
from gptjax.cli.wording import in_options

if TYPE_CHECKING:
    from gptjax.language_model import LanguageModel


def add(commands: Any) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "generate",
        run,
        summary="continue a prompt",
        epilog="""examples:
  gptjax generate "Once upon a time"
  gptjax generate "It was a dark" --model ./my-gpt2 --temperature 0.8 --top-p 0.95 --seed 1
  cat prompt.txt | gptjax generate --json > result.json""",
    )
    parser.add_argument(
        "prompt", nargs="?", help="the text to continue; if omitted or -, it is read from standard input"
    )
    parser.add_argument("-m", "--model", help=MODEL_HELP)
    add_model_options(parser)
    add_mesh(parser)
    add_hosts(parser)
    add_tokenizer(parser)
    add_overrides(parser)
    parser.add_argument("-n", "--max-tokens", type=int, metavar="N", help="tokens to generate, at most (default: 256)")
    parser.add_argument("-t", "--temperature", type=float, metavar="T", help="0 always takes the most likely token")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="draw from the smallest set of tokens whose probability reaches P"
    )
    parser.add_argument(
        "--min-p", type=float, metavar="P", help="draw from tokens at least P times as likely as the best"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, metavar="R", help="above 1: penalise tokens that are already in the text"
    )
    parser.add_argument(
        "--presence-penalty", type=float, metavar="A", help="subtracted from the logits of tokens already generated"
    )
    parser.add_argument("--frequency-penalty", type=float, metavar="A", help="subtracted once per earlier occurrence")
    parser.add_argument("--seed", type=int, metavar="N", help="makes the output repeatable")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="stop before this text; may be repeated")
    parser.add_argument("--ignore-eos", action="store_true", default=None, help="continue past the end-of-text token")
    parser.add_argument(
        "--top-logprobs", type=int, metavar="N", help="with --json: the N most likely tokens at each position"
    )
    parser.add_argument(
        "--special",
        action="store_true",
        default=None,
        help="read special tokens written in the prompt, like <|endoftext|>, as those tokens, not as plain text",
    )
    parser.add_argument("--echo", action="store_true", help="print the prompt before its continuation")
    parser.add_argument("--json", action="store_true", help="print the whole result as one JSON object instead")
    parser.add_argument("--stats", action="store_true", help="report the speed on standard error")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    with joined(args) as follows:
        if follows:
            lm = _load(args)
            return followed(lm.model, lm.params)
        return _run(args)


def _load(args: argparse.Namespace) -> "LanguageModel":
    from gptjax.api import load

    return load(
        model_name(args),
        dtype=args.dtype,
        cache_dtype=args.cache_dtype,
        max_length=args.max_length,
        packed=packed(args),
        mesh=mesh(args),
        tokenizer=args.tokenizer,
        **overrides(args),
    )


def _run(args: argparse.Namespace) -> int:
    from gptjax.engine.options import GenerateOptions
    from gptjax.errors import RequestError

    prompt = args.prompt
    if prompt is None or prompt == "-":
        if prompt is None and sys.stdin.isatty():
            raise RequestError('the prompt is missing; try: gptjax generate "Once upon a time"')
        prompt = read_stdin()
    options = {name: getattr(args, name) for name in GenerateOptions.__annotations__ if hasattr(args, name)}
    options = {name: value for name, value in options.items() if value is not None}
    lm = _load(args)
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
        print(json.dumps({"prompt": prompt, **dataclasses.asdict(completion)}, allow_nan=False))
    else:
        print()
    if args.stats:
        rate = completion.timings.tokens_per_second(completion.usage.completion_tokens)
        first = completion.timings.time_to_first_token
        print(f"{completion.usage}, first token after {first:.3f} s, then {rate:.1f} tokens/s", file=sys.stderr)
    if completion.error is not None:
        print(f"gptjax: {in_options(completion.error, args.parser)}", file=sys.stderr)
        return 1
    return 0
