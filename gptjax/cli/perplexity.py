"""`gptjax perplexity`."""

import argparse
import json
import time
from typing import Any

from gptjax.cli.common import (
    MODEL_HELP,
    add_cache_dtype,
    add_command,
    add_dtype,
    add_ignore_config,
    add_mesh,
    add_packed,
    mesh,
    model_name,
    overrides,
    packed,
)


def add(commands: Any) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "perplexity",
        run,
        summary="measure how well a model predicts a text",
        epilog="""Prints the perplexity, its standard error (as if the tokens' losses were independent), the number of
tokens predicted, and how many per second, compilation included.

The text goes through the model in windows. Without --stride they are independent, and the first token of each is not
predicted. With it, each window starts N tokens after the previous one and predicts only what that one did not: each
token once, with at least MAX_LENGTH - N tokens before it. That is slower but fairer, as in Hugging Face's guide.

examples:
  gptjax perplexity
  gptjax perplexity gpt2-tales --text ./book.txt --max-length 256 --stride 128 --json""",
    )
    parser.add_argument("model", nargs="?", help=MODEL_HELP)
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text (default: 16 kB of tales held out from the demos)")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens between windows' starts (default: a window)")
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="tokens in a window (default: all the model has, at most 2048)"
    )
    add_dtype(parser)
    add_cache_dtype(parser)
    add_packed(parser)
    add_mesh(parser)
    add_ignore_config(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from gptjax.api import load_checkpoint
    from gptjax.checkpoints.checkpoint import open_checkpoint
    from gptjax.diagnostics.perplexity import HELD_OUT, Perplexity, check_stride, predict, read, window, windows
    from gptjax.support.progress import progress

    name, path = model_name(args), args.text or HELD_OUT
    text = read(path)
    checkpoint = open_checkpoint(name, **overrides(args))
    length = window(checkpoint.config, args.max_length)
    lm = load_checkpoint(
        checkpoint,
        dtype=args.dtype,
        cache_dtype=args.cache_dtype,
        max_length=length,
        packed=packed(args),
        mesh=mesh(args),
    )
    ids = lm.tokenizer.prompt(text)
    size = lm.max_length
    stride = check_stride(args.stride, size)
    total = sum(end - start for start, end, _ in windows(len(ids), size, stride))
    started = time.perf_counter()
    with progress("predicting", total, "tokens") as advance:
        found = Perplexity.of(predict(lm, ids, stride=stride, advance=advance).losses)
    rate = found.num_tokens / (time.perf_counter() - started)
    if args.json:
        facts: dict[str, Any] = {"model": str(name), "text": str(path), "max_length": size, "stride": stride}
        facts |= {"perplexity": found.value, "standard_error": found.standard_error, "tokens": found.num_tokens}
        print(json.dumps(facts | {"tokens_per_second": rate}))
        return 0
    print(
        f"perplexity {found.value:.2f} ± {found.standard_error:.2f} on {found.num_tokens:,} tokens "
        f"(windows of {size}, stride {stride}), {rate:.0f} tokens/s"
    )
    return 0
