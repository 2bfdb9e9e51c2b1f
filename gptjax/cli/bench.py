"""`gptjax bench`."""

import argparse
import itertools
import json
import time
from typing import Any

from gptjax.cli.common import MODEL_HELP, add_command, add_dtype


def add(commands: Any) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "bench",
        run,
        summary="measure the speed of prefill and decode",
        epilog="""Medians over repeats, with the spread from fastest to slowest; compilation and first calls apart.
The share of the ceiling is of the memory's speed, measured in the same run by a large copy.

examples:
  gptjax bench gpt2-tales
  gptjax bench --random gpt2 --batch 1 8 --prompt-length 128 --versus transformers
  gptjax bench ./my-gpt2 --dtype bfloat16 --json""",
    )
    parser.add_argument("model", nargs="?", help=MODEL_HELP)
    parser.add_argument("--random", metavar="NAME", help="random weights of a published size instead, such as gpt2-xl")
    add_dtype(parser)
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="N", help="rows (default: 1)")
    parser.add_argument("--prompt-length", type=int, nargs="+", default=[128], metavar="T", help="default: 128")
    parser.add_argument("--steps", type=int, default=64, metavar="N", help="decode steps a measurement (default: 64)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="measurements (default: 7)")
    parser.add_argument("--versus", choices=["transformers"], help="measure this as well, in turns")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    import jax

    from gptjax import bench, hub, memory, runtime
    from gptjax.api import DEFAULT_MODEL, load
    from gptjax.config import PUBLISHED
    from gptjax.errors import RequestError
    from gptjax.memory import readable
    from gptjax.models import registry

    for name in ("batch", "prompt_length", "steps", "repeats"):
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            raise RequestError(f"--{name.replace('_', '-')} must be at least 1, found {values}")
    if args.random is not None and args.model is not None:
        raise RequestError("name a checkpoint or --random, not both")
    started = time.perf_counter()
    if args.random is not None:
        if args.random not in PUBLISHED:
            raise RequestError(f"there is no size {args.random!r}; there are {', '.join(PUBLISHED)}")
        runtime.enable_compilation_cache()
        model = registry.build(PUBLISHED[args.random], dtype=runtime.compute_dtype(args.dtype))
        memory.check(model, batch=max(args.batch), max_length=model.config.context_length)
        params, name, directory = registry.random_params(model), f"{args.random} (random weights)", None
        jax.block_until_ready(params)
    else:
        name = args.model or DEFAULT_MODEL
        lm = load(name, dtype=args.dtype)
        model, params, directory = lm.model, lm.params, hub.resolve(name)
    load_seconds = time.perf_counter() - started
    results = []
    for batch in args.batch:
        for length in args.prompt_length:
            sizes = {"batch": batch, "prompt_length": length, "steps": args.steps}
            turns = [("gptjax", bench.ours(model, params, **sizes))]
            if args.versus:
                turns.append(("transformers", bench.transformers_turn(model, directory=directory, **sizes)))
            with memory.explained(model, batch=batch, max_length=model.config.context_length):
                results += bench.run(turns, model, repeats=args.repeats, **sizes)
            del turns  # and the cache with them, before the next ones take theirs
    ceiling = bench.measure_ceiling()
    device = jax.devices()[0].device_kind
    dtype = jax.numpy.dtype(model.dtype).name
    if args.json:
        facts = {"model": name, "device": device, "dtype": dtype, "load_seconds": load_seconds}
        facts |= {"ceiling_bytes_per_second": ceiling}
        print(json.dumps({**facts, "results": [result.to_json(ceiling) for result in results]}))
        return 0
    print(
        f"{name}, {dtype}, on {device}; loaded in {load_seconds:.1f} s; a large copy moves {readable(int(ceiling))}/s"
    )
    heads = ("rows prompt  prefill tok/s  spread", "ms/step  spread  decode tok/s", "of ceiling  compile      peak")
    print(f"engine        {'   '.join(heads)}")
    for result in results:
        share = result.share(ceiling)
        noisy = [part for part, figure in (("prefill", result.prefill), ("decode", result.step)) if figure.noisy]
        print(
            f"{result.engine:12} {result.batch:5} {result.prompt_length:6} {result.prefill_tokens_per_second:14.0f} "
            f"{result.prefill.spread / result.prefill.median:7.0%} {1e3 * result.step.median:9.3f} "
            f"{result.step.spread / result.step.median:7.0%} {result.decode_tokens_per_second:13.1f}  "
            + (f"{share:10.0%} {result.compile:6.1f} s" if share is not None else f"{'':10} {'':8}")
            + f" {readable(result.peak_memory):>9}"
            + (f"  noise in {' and '.join(noisy)}: small differences mean nothing" if noisy else "")
        )
    for mine, theirs in itertools.pairwise(results):
        if args.versus and mine.engine == "gptjax":
            decode = mine.decode_tokens_per_second / theirs.decode_tokens_per_second
            prefill = mine.prefill_tokens_per_second / theirs.prefill_tokens_per_second
            print(f"{mine.batch} rows: {decode:.2f} times the decode rate of {theirs.engine}, {prefill:.2f} of prefill")
    return 0
