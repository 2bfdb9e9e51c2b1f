"""`gptjax perplexity`."""

import argparse
import json
import time
from typing import Any

from gptjax.cli.common import MODEL_HELP, add_command, add_dtype, add_ignore_config, model_name, overrides


def add(commands: Any) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "perplexity",
        run,
        summary="tell how well a model predicts a text",
        epilog="""Prints the perplexity, its standard error (as if the tokens' losses were independent), the tokens that
were predicted, and how many a second that is, with compilation.

The text goes through the model in windows. Without --stride they do not see each other, and the first token of each is
not predicted. With it, a window starts N tokens after the one before and predicts what that did not: each token once,
with at least MAX_LENGTH - N tokens before it. Slower, and the fairer figure, as in Hugging Face's guide.

examples:
  gptjax perplexity
  gptjax perplexity gpt2-tales --text ./book.txt --max-length 256 --stride 128 --json""",
    )
    parser.add_argument("model", nargs="?", help=MODEL_HELP)
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text (default: 16 kB of tales that the demos never read)")
    parser.add_argument("--stride", type=int, metavar="N", help="from one window to the next (default: a window)")
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="tokens of a window (default: all the model has, 2048 at most)"
    )
    add_dtype(parser)
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
    lm = load_checkpoint(checkpoint, dtype=args.dtype, max_length=window(checkpoint.config, args.max_length))
    ids = lm.tokenizer.prompt(text)
    size = lm.max_length
    stride = check_stride(args.stride, size)
    total = sum(end - start for start, end, _ in windows(len(ids), size, stride))
    started = time.perf_counter()
    with progress("Predicting", total, "tokens") as advance:
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
