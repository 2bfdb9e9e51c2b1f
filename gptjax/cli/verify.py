"""`gptjax verify`."""

import argparse
import json
from typing import Any

from gptjax.cli.common import MODEL_HELP, add_command, add_ignore_config, model_name, overrides


def add(commands: Any) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "verify",
        run,
        summary="check a published checkpoint against known answers",
        epilog="""Answers are known for the published gpt2 and GPT-OSS (greedy tokens) and for the demos. For others:
`gptjax compare`. Exits with 1 if an answer is wrong, as for fine-tuned weights, or if none is known.

examples:
  gptjax verify
  gptjax verify openai-community/gpt2""",
    )
    parser.add_argument("model", nargs="?", help=MODEL_HELP)
    add_ignore_config(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per check")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    import dataclasses

    from gptjax.api import load
    from gptjax.diagnostics.known_answers import verify
    from gptjax.errors import CheckpointError

    name = model_name(args)
    checks = verify(load(name, dtype="float32", generation_config=False, **overrides(args)))
    if not checks:
        raise CheckpointError(
            f"no answers are known for a model with the vocabulary and sizes of {name}; "
            f"compare it with transformers: gptjax compare {name}"
        )
    for check in checks:
        if args.json:
            print(json.dumps(dataclasses.asdict(check)))
        elif check.agrees:
            print(f"ok     {check.name}: {check.found}")
        else:
            print(
                f"WRONG  {check.name}: expected {check.expected}\n       {'':{len(check.name)}}     found {check.found}"
            )
    return 0 if all(check.agrees for check in checks) else 1
