"""`gptjax bench`."""

import argparse
import itertools
import json
import time
from typing import Any

from gptjax.cli.common import MODEL_HELP, add_command


def add(commands: Any) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "bench",
        run,
        summary="measure the speed of prefill and decode",
        epilog="""Medians over repeats, with the spread from fastest to slowest; first calls, which compile, apart.
The share of the ceiling is of the memory's speed, measured in the same run by a large copy.

examples:
  gptjax bench gpt2-tales
  gptjax bench --random gpt2 --batch 1 8 --prompt-length 128 --versus transformers
  gptjax bench ./my-gpt2 --dtype bfloat16 --json""",
    )
    parser.add_argument("model", nargs="?", help=MODEL_HELP)
    parser.add_argument("--random", metavar="NAME", help="random weights of a published size instead, such as gpt2-xl")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float32 on a CPU, else bfloat16)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="N", help="rows (default: 1)")
    parser.add_argument("--prompt-length", type=int, nargs="+", default=[128], metavar="T", help="default: 128")
    parser.add_argument("--steps", type=int, default=64, metavar="N", help="decode steps a measurement (default: 64)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="measurements (default: 7)")
    parser.add_argument("--versus", choices=["transformers"], help="measure this as well, in turns")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    import jax

    from gptjax import bench, hub, runtime
    from gptjax.api import DEFAULT_MODEL, load
    from gptjax.config import PUBLISHED
    from gptjax.errors import RequestError
    from gptjax.memory import readable
    from gptjax.models import registry

    for name in ("batch", "prompt_length", "steps", "repeats"):
        values = getattr(args, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            raise RequestError(f"--{name.replace('_', '-')} must be at least 1, found {values}")
    started = time.perf_counter()
    if args.random is not None:
        if args.random not in PUBLISHED:
            raise RequestError(f"there is no size {args.random!r}; there are {', '.join(PUBLISHED)}")
        runtime.enable_compilation_cache()
        model = registry.build(PUBLISHED[args.random], dtype=runtime.compute_dtype(args.dtype))
        params, name, directory = registry.random_params(model), f"{args.random} (random weights)", None
        jax.block_until_ready(params)
    else:
        name = args.model or DEFAULT_MODEL
        lm = load(name, dtype=args.dtype)
        model, params, directory = lm.model, lm.params, hub.resolve(name)
    load_seconds = time.perf_counter() - started
    ceiling = bench.measure_ceiling()
    results = []
    for batch in args.batch:
        for length in args.prompt_length:
            sizes = {"batch": batch, "prompt_length": length, "steps": args.steps}
            turns = [("gptjax", bench.ours(model, params, **sizes))]
            if args.versus:
                turns.append(("transformers", bench.transformers_turn(model, directory=directory, **sizes)))
            results += bench.run(turns, model, repeats=args.repeats, **sizes)
    device = jax.devices()[0].device_kind
    dtype = jax.numpy.dtype(model.dtype).name
    if args.json:
        facts = {"model": name, "device": device, "dtype": dtype, "load_seconds": load_seconds}
        facts |= {"ceiling_bytes_per_second": ceiling, "peak_memory_bytes": bench.peak_memory()}
        print(json.dumps({**facts, "results": [result.to_json(ceiling) for result in results]}))
        return 0
    print(
        f"{name}, {dtype}, on {device}; loaded in {load_seconds:.1f} s; a large copy moves {readable(int(ceiling))}/s"
    )
    print("engine        rows prompt  prefill tok/s   ms/step      spread   decode tok/s  of ceiling  first call")
    for result in results:
        step, first = result.step, result.first_call
        share = f"{100 * result.share(ceiling):9.0f}%" if result.engine == "gptjax" else " " * 10
        noise = "  noise: the spread is wide" if step.noisy or result.prefill.noisy else ""
        print(
            f"{result.engine:12} {result.batch:5} {result.prompt_length:6} {result.prefill_tokens_per_second:14.0f} "
            f"{1e3 * step.median:9.3f} {1e3 * step.spread:11.3f} {result.decode_tokens_per_second:14.1f}  {share} "
            f"{first:9.1f} s{noise}"
        )
    for mine, theirs in itertools.pairwise(results):
        if args.versus and mine.engine == "gptjax":
            decode = mine.decode_tokens_per_second / theirs.decode_tokens_per_second
            prefill = mine.prefill_tokens_per_second / theirs.prefill_tokens_per_second
            print(f"{mine.batch} rows: {decode:.2f} times the decode rate of {theirs.engine}, {prefill:.2f} of prefill")
    print(f"peak memory {readable(bench.peak_memory())}")
    return 0
