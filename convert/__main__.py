"""The converter's command line: `python -m convert SOURCE DESTINATION`, also available as `gptjax convert`."""

import argparse
import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from convert import DTYPES
from gptjax.config.quantization import TARGETS
from gptjax.errors import GptjaxError
from gptjax.support.quoting import clean, shown

if TYPE_CHECKING:
    from convert.conversion import Summary

_EXAMPLES = """\
examples:
  python -m convert ~/models/gpt2 ~/models/gpt2-jax
  python -m convert ~/models/gpt2-xl ~/models/gpt2-xl-bf16 --dtype bfloat16
  python -m convert ~/models/gpt2 ~/models/gpt2-mxfp4 --quantize mxfp4=all
  python -m convert ~/models/gpt2 ~/models/gpt2-jax --overwrite
  python -m convert --verify ~/models/gpt2-jax
  python -m convert ~/models/gpt2-jax ~/models/gpt2-again --to hf
  python -m convert ~/models/my-gpt-oss ~/models/my-gpt-oss-mxfp4 --to hf --quantize mxfp4

A source directory needs config.json, model.safetensors (or model.safetensors.index.json and its files) and
tokenizer.json.
Pickle files (pytorch_model.bin, *.pt, *.ckpt) are refused: opening one runs the code inside it.
A conversion that was killed continues when it is started again with the same arguments.
exit codes: 0 success, 1 the conversion failed and wrote nothing, or --verify found damage, 2 wrong usage"""
_UNITS: Final = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `run` takes."""
    parser.set_defaults(wrong_usage=parser.error)
    parser.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="directory with config.json and safetensors files, a GGUF file, or a Hub id such as gpt2; with --to hf "
        "also a converted directory",
    )
    parser.add_argument(
        "destination", nargs="?", metavar="DESTINATION", help="directory to write; its parent must exist"
    )
    parser.add_argument(
        "--to",
        choices=("gptjax", "hf"),
        default="gptjax",
        help="what to write: a directory that gptjax loads fast (the default), or Hugging Face safetensors that "
        "transformers loads",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="dtype to store floating-point weights in (default: unchanged; with --to hf, float32 for what a GGUF "
        "file has packed)",
    )
    parser.add_argument(
        "--quantize",
        choices=["mxfp4", *(f"mxfp4={targets}" for targets in TARGETS[1:])],
        help="round weights to MXFP4 (4.25 bits each): GPT-OSS's experts, as OpenAI does (mxfp4, short for "
        "mxfp4=experts); every matrix in the blocks (linear); or also the embeddings and the head (all). --dtype "
        "applies to the rest",
    )
    parser.add_argument(
        "--max-shard-size",
        type=_size,
        metavar="SIZE",
        help="with --to hf: the most bytes of tensors in a file, such as 500MB (default: 5GB)",
    )
    parser.add_argument(
        "--ignore-config",
        action="append",
        default=[],
        metavar="KEY",
        help="drop this key from config.json, if you know that it has no effect; repeatable",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the destination if gptjax wrote it, in the same format"
    )
    parser.add_argument(
        "--verify",
        metavar="DIRECTORY",
        help="write nothing, but compare a converted directory with its checksums and name every damaged file",
    )


def _size(text: str) -> int:
    match = re.fullmatch(r"([1-9][0-9]{0,14})([KMG]?B)?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 5GB")
    return int(match[1]) * _UNITS[(match[2] or "").upper()]


def run(args: argparse.Namespace) -> int:
    """Does what was asked for and prints one line about it.

    Returns 0, or 1 if `--verify` found damage. Raises `GptjaxError`.
    """
    _check_combination(args)
    return _verify(args.verify) if args.verify is not None else _convert(args)


def _check_combination(args: argparse.Namespace) -> None:
    given = {
        "SOURCE": args.source,
        "--to": args.to == "hf",
        "--dtype": args.dtype,
        "--quantize": args.quantize,
        "--max-shard-size": args.max_shard_size,
        "--ignore-config": args.ignore_config,
        "--overwrite": args.overwrite,
    }
    extra = [name for name, value in given.items() if value]
    if args.verify is not None and extra:
        args.wrong_usage(
            f"--verify DIRECTORY checks what is there and writes nothing, so it takes no {', '.join(extra)}"
        )
    if args.verify is None and args.destination is None:
        args.wrong_usage("name a SOURCE and a DESTINATION, or --verify DIRECTORY")
    if args.max_shard_size is not None and args.to != "hf":
        args.wrong_usage("--max-shard-size is for --to hf; a converted directory has no shards")


def _convert(args: argparse.Namespace) -> int:
    from convert.conversion import convert
    from convert.exporting import SHARD_BYTES, export
    from gptjax.checkpoints import hub
    from gptjax.support.progress import progress

    write: Callable[..., Summary] = convert
    if args.to == "hf":
        write = functools.partial(export, max_shard_bytes=args.max_shard_size or SHARD_BYTES)
    summary = write(
        hub.resolve(args.source),
        args.destination,
        dtype=args.dtype,
        quantize=args.quantize and (args.quantize.removeprefix("mxfp4").removeprefix("=") or "experts"),
        overwrite=args.overwrite,
        ignore_config=args.ignore_config,
        progress=progress,
    )
    print(
        f"{summary.destination}: {summary.num_params:,} parameters in {summary.num_weights} weights, "
        f"{', '.join(summary.dtypes)}, {summary.bytes / 1e6:,.1f} MB, {summary.seconds:.1f} s"
    )
    for note in summary.notes:
        print(clean(note))
    return 0


def _verify(directory: str) -> int:
    from convert.verification import verify
    from gptjax.support.progress import progress

    found = verify(directory, progress=progress)
    for fault in found.faults:
        print(clean(fault), file=sys.stderr)
    state = f"{len(found.faults)} damaged; copy the directory or convert again" if found.faults else "all sound"
    print(f"{shown(directory)}: {found.num_weights} weights, {found.bytes / 1e6:,.1f} MB, {state}")
    return 1 if found.faults else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0, 1 after one message on stderr, or 130 after Ctrl-C; exits with 2 on wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description="Converts a Hugging Face checkpoint or a GGUF file, in bounded memory, to a directory that gptjax "
        "loads fast, or exports one again.",
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
