"""The converter's command line: `python -m convert SOURCE DESTINATION`, also available as `gptjax convert`."""

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
Pickle files (pytorch_model.bin, *.pt, *.ckpt) are refused: opening one runs the code inside it.
exit codes: 0 success, 1 the conversion failed and wrote nothing, 2 wrong usage"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `run` takes."""
    parser.add_argument(
        "source", metavar="SOURCE", help="directory with config.json and safetensors files, or a Hub id such as gpt2"
    )
    parser.add_argument("destination", metavar="DESTINATION", help="directory to write; its parent must exist")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype to store floating-point weights in (default: unchanged)")
    parser.add_argument(
        "--quantize",
        choices=[f"mxfp4={targets}" for targets in TARGETS[1:]],
        help="round weights to MXFP4 (4.25 bits each): the experts; every matrix in the blocks (linear); or also the "
        "embeddings and the head (all). --dtype applies to the rest",
    )
    parser.add_argument(
        "--ignore-config",
        action="append",
        default=[],
        metavar="KEY",
        help="drop this key from config.json, if you know that it has no effect; repeatable",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the destination if it is a converted checkpoint"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the conversion and prints one line about it. Returns 0. Raises `GptjaxError`."""
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
    """Runs the command. Returns 0, 1 after one message on stderr, or 130 after Ctrl-C; exits with 2 on wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Converts a Hugging Face checkpoint, in bounded memory, to a directory that gptjax loads fast.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    if argv is None:  # our own process: conversion needs no accelerator and must not take its memory
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
