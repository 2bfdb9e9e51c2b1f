"""The command line of conversion: `python -m convert SOURCE DESTINATION`, which is also `gptjax convert`."""

import argparse
import os
import sys
from collections.abc import Sequence

from convert import DTYPES
from gptjax.config.quantization import TARGETS
from gptjax.errors import GptjaxError
from gptjax.support.quoting import clean

_EXAMPLES = """\
examples:
  python -m convert ~/models/gpt2 ~/models/gpt2-jax
  python -m convert ~/models/gpt2-xl ~/models/gpt2-xl-bf16 --dtype bfloat16
  python -m convert ~/models/gpt2 ~/models/gpt2-mxfp4 --quantize mxfp4=all
  python -m convert ~/models/gpt2 ~/models/gpt2-jax --overwrite

The source needs config.json, model.safetensors (or model.safetensors.index.json and its files) and tokenizer.json.
Pickle files (pytorch_model.bin, *.pt, *.ckpt) are refused: opening one runs the code that is in it.
exit codes: 0 done, 1 the conversion failed and nothing was written, 2 wrong usage."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of a conversion, for `run`."""
    parser.add_argument(
        "source", metavar="SOURCE", help="directory with config.json and safetensors files, or a Hub id such as gpt2"
    )
    parser.add_argument("destination", metavar="DESTINATION", help="directory to write; its parent must exist")
    parser.add_argument("--dtype", choices=DTYPES, help="what floating weights are stored as (default: as they are)")
    parser.add_argument(
        "--quantize",
        choices=[f"mxfp4={targets}" for targets in TARGETS[1:]],
        help="round weights to MXFP4, 4.25 bits a number: of the experts; of all products of the blocks (linear); of "
        "the embeddings and the head as well (all). --dtype is for the rest",
    )
    parser.add_argument(
        "--ignore-config",
        action="append",
        default=[],
        metavar="KEY",
        help="leave this key out of config.json, if you know that it changes nothing; may be given again",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the destination, if it is a converted checkpoint"
    )


def run(args: argparse.Namespace) -> int:
    """Converts as the arguments say and prints a line about it. Returns 0. Raises `GptjaxError`."""
    from convert.conversion import convert
    from gptjax.checkpoints import hub
    from gptjax.support.progress import progress

    source = hub.resolve(args.source)
    summary = convert(
        source,
        args.destination,
        dtype=args.dtype,
        quantize=args.quantize and args.quantize.removeprefix("mxfp4="),
        overwrite=args.overwrite,
        ignore_config=args.ignore_config,
        progress=progress,
    )
    print(
        f"{summary.destination}: {summary.num_params:,} parameters in {summary.num_weights} weights, "
        f"{', '.join(summary.dtypes)}, {summary.bytes / 1e6:,.1f} MB, {summary.seconds:.1f} s"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The console script: returns 0, 1 after one message on stderr, or 130 for Ctrl-C. Wrong usage exits with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Converts a Hugging Face checkpoint to a directory that gptjax loads fast, in bounded memory.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    if argv is None:  # a process of its own: conversion needs no accelerator, and must not take the memory of one
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        return run(args)
    except GptjaxError as error:
        print(f"python -m convert: {clean(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("python -m convert: interrupted; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
