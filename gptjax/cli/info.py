"""`gptjax info`."""

import argparse
import json
from typing import Any

from gptjax.cli.common import (
    MODEL_HELP,
    add_command,
    add_mesh,
    add_model_options,
    add_overrides,
    mesh,
    model_name,
    overrides,
    packed,
)
from gptjax.support.quoting import clean, quoted
from gptjax.support.units import readable


def add(commands: Any) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "info",
        run,
        summary="describe a checkpoint and the memory it needs",
        epilog="examples:\n  gptjax info gpt2-tales\n  gptjax info ./my-gpt2 --tensors --dtype bfloat16\n"
        "  gptjax info model.gguf\n  gptjax info --size gpt-oss-120b --memory 80\n"
        "  gptjax info --size gpt-oss-120b --device h100-80gb --mesh tensor=2 --max-batch 32 --max-length 8192",
    )
    parser.add_argument("model", nargs="?", help=MODEL_HELP)
    add_model_options(parser)
    add_mesh(parser)
    add_overrides(parser)
    parser.add_argument("--max-batch", type=int, default=1, metavar="N", help="rows computed together (default: 1)")
    parser.add_argument("--size", metavar="NAME", help="describe a published size instead, without a checkpoint")
    parser.add_argument(
        "--memory", type=float, metavar="GB", help="check a GPU with this much memory instead of this device"
    )
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="check this GPU, such as h100-80gb, and say how fast it could decode at best if --max-batch rows have "
        "--max-length positions",
    )
    parser.add_argument("--tensors", action="store_true", help="list every weight with its shape and stored dtype")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    from gptjax.diagnostics.cards import card_of
    from gptjax.diagnostics.info import describe, describe_published, describe_tensors, imagined_gpu
    from gptjax.errors import RequestError

    if args.size is not None and (args.model is not None or args.tensors or args.packed is not None):
        raise RequestError("--size describes no checkpoint: leave out the model's name, --tensors and --packed")
    card = None if args.device is None else card_of(args.device)
    device = None if args.memory is None else imagined_gpu(1e9 * args.memory)
    if card is not None and device is None:
        device = imagined_gpu(card.memory, args.device)
    asked = {
        "dtype": args.dtype,
        "cache_dtype": args.cache_dtype,
        "max_length": args.max_length,
        "max_batch": args.max_batch,
        "device": device,
    }
    asked |= {"mesh": mesh(args), "card": card}
    name = model_name(args)
    facts = (
        describe_published(args.size, **asked)
        if args.size is not None
        else describe(name, **asked, packed=packed(args), **overrides(args))
    )
    tensors = describe_tensors(name, ignore_config=args.ignore_config) if args.tensors else {}
    status = 1 if str(facts.get("weights", "")).startswith("cannot be used") else 0
    if args.json:
        print(json.dumps({**facts, **({"tensors": tensors} if args.tensors else {})}, ensure_ascii=False))
        return status
    metadata = facts.pop("metadata", {})
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        print(clean(f"{key.removesuffix('_bytes'):{width}}  {_fact(key, value)}"))
    for key, value in metadata.items():
        text = f"{value['length']} values" if isinstance(value, dict) else quoted(value)
        print(clean(f"{key}  {text}"))
    for path, value in tensors.items():
        print(clean(f"{path}  {value}"))
    return status


def _fact(key: str, value: Any) -> str:
    """A value for people: sizes with units, and once what is the same in all layers."""
    if key.endswith("_bytes"):
        return readable(value)
    if isinstance(value, tuple) and len(value) > 1 and len(set(value)) == 1:
        return f"{value[0]} in all {len(value)} layers"
    return str(value)
