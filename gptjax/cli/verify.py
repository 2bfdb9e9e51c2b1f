"""`gptjax verify`."""

import argparse
import json
from typing import Any

from gptjax.cli.common import CACHE_DTYPE, MODEL_HELP, add_command, add_ignore_config, model_name, overrides
from gptjax.errors import RequestError


def add(commands: Any) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "verify",
        run,
        summary="check a published checkpoint against known answers, or whether results depend on the load",
        epilog="""Answers are known for the published gpt2 and GPT-OSS (greedy tokens) and for the demos. For others:
`gptjax compare`. Exits with 1 if an answer is wrong, as for fine-tuned weights, or if none is known.

With --invariance, random requests are computed one at a time, then in each other's company: coming and going, with
beginnings in common, in a cache that is too small for all. Exits with 1 if one was given other bits.

examples:
  gptjax verify
  gptjax verify openai-community/gpt2
  gptjax verify --invariance --max-batch 1 8 --requests 50""",
    )
    parser.add_argument("model", nargs="?", help=MODEL_HELP)
    add_ignore_config(parser)
    parser.add_argument(
        "--invariance", action="store_true", help="instead, check whether a request's bits depend on other requests"
    )
    parser.add_argument(
        "--max-batch", type=int, nargs="+", metavar="N", help="numbers of requests computed together (default: 1 8)"
    )
    parser.add_argument("--requests", type=int, metavar="N", help="random requests (default: 20)")
    parser.add_argument("--dtype", help="of --invariance (default: float32 on a CPU, else bfloat16)")
    parser.add_argument("--cache-dtype", **{**CACHE_DTYPE, "help": "of --invariance (default: --dtype)"})
    parser.add_argument("--json", action="store_true", help="print one JSON object per check")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    if args.invariance:
        return _invariance(args)
    of_invariance = args.max_batch, args.requests, args.dtype, args.cache_dtype
    if any(each is not None for each in of_invariance):
        raise RequestError("--max-batch, --requests, --dtype and --cache-dtype are for --invariance")
    return _answers(args)


def _invariance(args: argparse.Namespace) -> int:
    import dataclasses

    from gptjax.api import load
    from gptjax.diagnostics.invariance import trials

    settings = {"dtype": args.dtype, "cache_dtype": args.cache_dtype, "generation_config": False, **overrides(args)}
    lm = load(model_name(args), **settings)
    max_batches = [1, 8] if args.max_batch is None else args.max_batch
    requests = 20 if args.requests is None else args.requests
    holds = True
    for trial in trials(lm.model, lm.params, requests=requests, max_batches=max_batches):
        holds &= not trial.different
        if args.json:
            print(json.dumps(dataclasses.asdict(trial)), flush=True)
            continue
        compared = "in company and alone" if trial.in_company else "alone and at max_batch 1"
        what = f"max_batch {trial.max_batch}, {compared}: {trial.requests} requests, {trial.tokens} tokens"
        if not trial.different:
            print(f"same   {what}", flush=True)
        else:
            print(
                f"OTHER  {what}: {trial.different} requests differ, from token {trial.first} on; log-probabilities of "
                f"the same token by up to {trial.largest:.1e}",
                flush=True,
            )
    return 0 if holds else 1


def _answers(args: argparse.Namespace) -> int:
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
