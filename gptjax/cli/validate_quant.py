"""`gptjax validate-quant`."""

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from gptjax.cli.common import (
    CACHE_DTYPE,
    MODEL_HELP,
    add_command,
    add_dtype,
    add_ignore_config,
    model_name,
    overrides,
)
from gptjax.config.quantization import TARGETS
from gptjax.support.quoting import names

if TYPE_CHECKING:
    from gptjax.diagnostics.packed_accuracy import Report

_CHOICES = [f"mxfp4={targets}" for targets in TARGETS[1:]]
_DEFAULT = "mxfp4=linear"


def add(commands: Any) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "validate-quant",
        run,
        summary="compare a float checkpoint with its packed form, or a cache in float8 with one in floats",
        epilog="""Rounds the weights to MXFP4 in memory, or takes the same model from a GGUF file (such as a Q4_K_M)
or from a directory that `gptjax convert --quantize` wrote. With --cache-dtype, the second form also keeps keys and
values in fp8; alone, this is all that differs. Reports cosine and relative error of each rounded weight and
of the hidden states after each block, how often both agree on the most likely token, and both perplexities. Exits with
0 only if all thresholds hold: cosines of at least 0.99, the same token at 95 percent of the positions or more, a
perplexity within 1 percent. Otherwise, and on errors, exits with 1.

If the first model is a GGUF file, its packed weights count as the numbers that they stand for. Both models are in
memory at the same time. Computes in float32 unless --dtype says otherwise.

examples:
  gptjax validate-quant gpt2-tales --quantize mxfp4=all
  gptjax validate-quant gpt-oss-tales --cache-dtype fp8
  gptjax validate-quant ./my-gpt2 --against ./my-gpt2-mxfp4 --text ./book.txt --plot ./errors.png
  gptjax validate-quant ./my-gpt2 --against ./my-gpt2-Q4_K_M.gguf""",
    )
    parser.add_argument("model", nargs="?", help=MODEL_HELP)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--quantize", choices=_CHOICES, help=f"default: {_DEFAULT}; none with --cache-dtype")
    form.add_argument(
        "--against", metavar="PATH", help="the packed form: a GGUF file, or a directory already converted"
    )
    parser.add_argument("--cache-dtype", **{**CACHE_DTYPE, "help": "keep the second form's keys and values in this"})
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text (default: 16 kB of tales held out from the demos)")
    parser.add_argument("--tokens", type=int, metavar="N", help="use at most N tokens of the text (default: all)")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw the errors by block, as PNG, PDF or SVG (needs matplotlib)"
    )
    add_dtype(parser)
    add_ignore_config(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from gptjax.api import load, load_checkpoint
    from gptjax.checkpoints.checkpoint import open_checkpoint
    from gptjax.diagnostics import packed_accuracy
    from gptjax.diagnostics.perplexity import HELD_OUT, read, window
    from gptjax.errors import RequestError
    from gptjax.support.plots import check_plot
    from gptjax.support.progress import progress

    if args.tokens is not None and args.tokens < 2:
        raise RequestError(f"--tokens must be at least 2, found {args.tokens}")
    if args.plot is not None:
        check_plot(args.plot)
    name, path = model_name(args), args.text or HELD_OUT
    text = read(path)
    checkpoint = open_checkpoint(name, **overrides(args))
    settings: dict[str, Any] = {"dtype": args.dtype or "float32", "max_length": window(checkpoint.config, None)}
    lm = load_checkpoint(checkpoint, packed=False, **settings)
    if args.against is not None:
        other = load(args.against, packed=True, cache_dtype=args.cache_dtype, **settings)
    else:
        choice = args.quantize or (_DEFAULT if args.cache_dtype is None else None)
        other = lm if choice is None else packed_accuracy.quantized(lm, choice.removeprefix("mxfp4="))
        if args.cache_dtype is not None:
            other = packed_accuracy.cached(other, args.cache_dtype)
    ids = lm.tokenizer.prompt(text)[: args.tokens]
    with progress("comparing", 2 * len(ids), "tokens") as advance:
        report = packed_accuracy.validate(lm, other, ids, advance=advance)
    if args.plot is not None:
        packed_accuracy.plot(report, args.plot)
    if args.json:
        verdicts = {"verdicts": [dataclasses.asdict(verdict) for verdict in report.verdicts], "passed": report.passed}
        print(json.dumps({"model": str(name), "text": str(path)} | dataclasses.asdict(report) | verdicts))
    else:
        _print(report)
    return 0 if report.passed else 1


def _print(report: "Report") -> None:
    width = max(len(row.name) for row in (*report.weights, *report.blocks))
    for title, rows in (
        ("weight", [(row, names(list(row.types))) for row in report.weights]),
        ("hidden states after", [(row, "") for row in report.blocks]),
    ):
        if not rows:
            continue  # the cache alone is rounded
        print(f"{title:{width}}   cosine    error")
        for row, types in rows:
            print(f"{row.name:{width}}  {row.cosine:7.5f}  {row.error:6.2%}  {types}".rstrip())
        print()
    forms = [f"in {names(list(report.types))}"] if report.types else []
    forms += [] if report.cache_dtype is None else [f"with keys and values in {report.cache_dtype}"]
    packed = " ".join(forms)
    for form, figure in (("as given", report.perplexity), (packed, report.quantized_perplexity)):
        print(f"perplexity {form}: {figure.value:.2f} ± {figure.standard_error:.2f} on {figure.num_tokens:,} tokens")
    for verdict in report.verdicts:
        print(f"{'ok  ' if verdict.holds else 'FAIL'}  {verdict.name}: {verdict.found} (threshold: {verdict.wanted})")
