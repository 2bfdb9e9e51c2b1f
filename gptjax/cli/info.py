"""`gptjax info`."""

import argparse
import json
from typing import Any

from gptjax.cli.common import MODEL_HELP, add_command, add_model_options
from gptjax.units import readable


def add(commands: Any) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "info",
        run,
        summary="tell what a checkpoint is and what memory it needs",
        epilog="examples:\n  gptjax info gpt2-tales\n  gptjax info ./my-gpt2 --tensors --dtype bfloat16",
    )
    parser.add_argument("model", nargs="?", help=MODEL_HELP)
    add_model_options(parser)
    parser.add_argument("--max-batch", type=int, default=1, metavar="N", help="rows computed together (default: 1)")
    parser.add_argument("--tensors", action="store_true", help="list every weight with its shape and stored dtype")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from gptjax.api import DEFAULT_MODEL
    from gptjax.info import describe, describe_tensors

    name = args.model or DEFAULT_MODEL
    facts = describe(name, dtype=args.dtype, max_length=args.max_length, max_batch=args.max_batch)
    tensors = describe_tensors(name) if args.tensors else {}
    if args.json:
        print(json.dumps({**facts, **({"tensors": tensors} if args.tensors else {})}, ensure_ascii=False))
        return 0
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        print(f"{key.removesuffix('_bytes'):{width}}  {readable(value) if key.endswith('_bytes') else value}")
    for path, value in tensors.items():
        print(f"{path}  {value}")
    return 0
