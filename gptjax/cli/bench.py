"""`gptjax bench`."""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gptjax.cli import bench_kernels
from gptjax.cli.common import (
    MODEL_HELP,
    add_cache_dtype,
    add_command,
    add_dtype,
    add_hosts,
    add_ignore_config,
    add_mesh,
    add_packed,
    followed,
    joined,
    mesh,
    model_name,
    overrides,
    packed,
)
from gptjax.config.quantization import KEPT

if TYPE_CHECKING:
    from pathlib import Path

    from gptjax.bench.ceilings import MemorySpeed
    from gptjax.bench.loading import Loading
    from gptjax.bench.models import Result
    from gptjax.config import ModelConfig
    from gptjax.models.params import Params
    from gptjax.models.registry import Model

_MEASURED = ("gpt2", "gpt2-xl", "gpt-oss-20b", "gpt-oss-120b")


def add(commands: Any) -> None:
    """Declares the command."""
    parser = add_command(
        commands,
        "bench",
        run,
        summary="measure the speed of loading, prefill and decode, or of the kernels alone",
        epilog="""Medians over repeats, with the spread from fastest to slowest, without compilation and first calls.
"Of ceiling" is the rate at which a step reads the bytes it must, as a share of this device's memory speed, measured in
the same run. For several rows of a mixture of experts, it counts the experts that even routing is expected to choose.
A kernel's time is that of one call in a chain of dependent calls.

examples:
  gptjax bench gpt2-tales
  gptjax bench --random gpt2 --batch 1 8 --prompt-length 128 --versus transformers
  gptjax bench ./my-gpt2 --dtype bfloat16 --json
  gptjax bench --random gpt-oss-20b --write-random ./random-20b && gptjax bench ./random-20b
  gptjax bench --kernels --plot roofline.png
  gptjax bench gpt-oss-tales --kernels moe attention --batch 1 4
  gptjax bench --random gpt-oss-20b --prompt-length 32768 --cache-dtype fp8
  gptjax bench --random gpt-oss-20b --tune
  gptjax bench --random gpt-oss-120b --mesh tensor=2 --batch 1 8 32 128""",
    )
    parser.add_argument("model", nargs="?", help=MODEL_HELP)
    parser.add_argument("--random", metavar="NAME", help="use random weights of a published size, such as gpt2-xl")
    parser.add_argument(
        "--quantize", metavar="TYPE", choices=("mxfp4", *KEPT), help="the type of the --random weights: mxfp4, Q4_K, …"
    )
    parser.add_argument(
        "--write-random",
        metavar="DIRECTORY",
        help="write the --random weights as a Hugging Face checkpoint and measure nothing",
    )
    add_dtype(parser)
    add_cache_dtype(parser)
    add_packed(parser)
    add_mesh(parser)
    add_hosts(parser)
    add_ignore_config(parser)
    parser.add_argument("--batch", type=int, nargs="+", metavar="N", help="rows (default: 1; for kernels, several)")
    parser.add_argument(
        "--prompt-length",
        type=int,
        nargs="+",
        metavar="T",
        help="prompt tokens (default: 128); for kernels, cache positions",
    )
    parser.add_argument("--steps", type=int, default=64, metavar="N", help="decode steps per measurement (default: 64)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="measurements (default: 7)")
    parser.add_argument("--versus", choices=["transformers"], help="measure this as well, taking turns")
    _add_kernels(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    """Declares what measures kernels instead of whole models."""
    parser.add_argument(
        "--kernels",
        nargs="*",
        metavar="OPERATION",
        help="measure only pallas_kernels' operations, all or those named (moe, matvec, attention, block, prefill), at "
        "the model's shapes, or at those of GPT-2 and GPT-OSS if no model is named",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw --kernels as a roofline: PNG, PDF or SVG (needs matplotlib)"
    )
    parser.add_argument(
        "--tune",
        nargs="?",
        const="",
        metavar="FILE",
        help="instead, try the kernels' settings at these shapes and write the fastest to this device's tile table, or "
        "to FILE",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the command."""
    with joined(args) as follows:
        return _run(args, follows)


def _run(args: argparse.Namespace, follows: bool) -> int:
    import jax

    from gptjax.bench import models
    from gptjax.bench.ceilings import measure_memory
    from gptjax.engine import memory

    _check(args)
    if args.kernels is not None or args.tune is not None:
        return bench_kernels.run(args, _shapes(args))
    args.batch, args.prompt_length = args.batch or [1], args.prompt_length or [128]
    if args.write_random is not None:
        return _write_random(args.random, args.write_random)
    model, params, name, directory, loading = _load(args)
    if follows:
        return followed(model, params)
    memory_speed = measure_memory()
    ceiling = memory_speed.bytes_per_second
    device, dtype = jax.devices()[0].device_kind, jax.numpy.dtype(model.dtype).name
    if not args.json:
        kept = "" if args.cache_dtype is None else f", cache in {args.cache_dtype}"
        title = f"{name}, {dtype}{kept}, on {device}{f' ({args.mesh})' if args.mesh else ''}"
        _print_head(title, loading, memory_speed)
    results = []
    for batch, prompt_length in itertools.product(args.batch, args.prompt_length):
        sizes = {"batch": batch, "prompt_length": prompt_length, "steps": args.steps}
        turns = [("gptjax", models.ours(model, params, **sizes))]
        if args.versus:
            turns.append(("transformers", models.transformers_turn(model, directory=directory, **sizes)))
        length = models.needed_length(model.config, prompt_length, args.steps)
        with memory.explained(model, batch=batch, max_length=length):
            found = models.run(turns, model, repeats=args.repeats, **sizes)
        del turns  # frees their caches before the next ones allocate theirs
        results += found
        if not args.json:
            _print_rows(found, ceiling)  # at once: the next size may take minutes to compile
    if args.json:
        facts = {"model": name, "device": device, "dtype": dtype, "mesh": args.mesh, "load_seconds": loading.seconds}
        facts |= {"cache_dtype": args.cache_dtype, "load_host_bytes": loading.host_bytes, **memory_speed.to_json()}
        print(json.dumps({**facts, "results": [result.to_json(ceiling) for result in results]}))
    return 0


def _check(args: argparse.Namespace) -> None:
    from gptjax.errors import RequestError

    for name in ("batch", "prompt_length", "steps", "repeats"):
        values = getattr(args, name)
        if values is not None and min(values if isinstance(values, list) else [values]) < 1:
            raise RequestError(f"--{name.replace('_', '-')} must be at least 1, found {values}")
    if args.random is not None and args.model is not None:
        raise RequestError("name a checkpoint or --random, not both")
    if args.write_random is not None and args.random is None:
        raise RequestError("--write-random needs a size to write: name it with --random, as in --random gpt-oss-20b")
    if args.plot is not None and (args.kernels is None or args.tune is not None):
        raise RequestError("--plot draws what --kernels measures: use it with --kernels, and without --tune")
    alone = args.kernels is not None or args.tune is not None
    if alone and (args.versus or args.write_random):
        raise RequestError("--versus and --write-random are for whole models: leave out --kernels and --tune")
    if args.quantize is not None and (args.random is None or args.write_random is not None or args.versus or alone):
        raise RequestError(
            "--quantize packs the weights that --random makes, of a whole model: name a size with --random, and leave "
            "out --write-random, --versus, --kernels and --tune"
        )
    if args.packed is not None and (args.random is not None or alone):
        raise RequestError("--packed is for a checkpoint's weights: leave out --random, --kernels and --tune")
    if args.mesh is not None and (alone or args.versus or args.write_random):
        raise RequestError("--mesh is for whole models: leave out --kernels, --tune, --versus and --write-random")
    if args.cache_dtype is not None and (args.tune is not None or args.write_random is not None):
        raise RequestError("--cache-dtype is for measurements: leave out --tune and --write-random")
    if args.cache_dtype is not None and args.kernels and not {"attention", "prefill"} & set(args.kernels):
        raise RequestError("--cache-dtype is for attention: name attention or prefill with --kernels")
    if args.tune is not None and args.json:
        raise RequestError("--tune writes its result to the table: leave out --json")


def _shapes(args: argparse.Namespace) -> "dict[str, ModelConfig]":
    """The models whose shapes kernels are measured at."""
    from gptjax.checkpoints.checkpoint import open_checkpoint
    from gptjax.config import published

    if args.model is not None:
        return {args.model: open_checkpoint(args.model, **overrides(args)).config}
    return {name: published(name) for name in ([args.random] if args.random else _MEASURED)}


def _write_random(name: str, directory: str) -> int:
    from pathlib import Path

    from convert.random import write_random
    from gptjax.config import published
    from gptjax.support.units import readable

    written = write_random(published(name), Path(directory))
    print(f"{directory}: random weights of {name}, {readable(written)}")
    return 0


def _load(args: argparse.Namespace) -> "tuple[Model, Params, str, Path | None, Loading]":
    """The model and its weights, its name, its directory if it has one, and how loading went."""
    from gptjax.api import load_checkpoint, on_mesh
    from gptjax.bench import models
    from gptjax.bench.loading import measure_loading
    from gptjax.checkpoints.checkpoint import open_checkpoint
    from gptjax.config import published
    from gptjax.engine import memory
    from gptjax.models import registry, shards
    from gptjax.models.packing import quantized
    from gptjax.models.params import abstract_params, random_params, repacked, weights_by_path
    from gptjax.support import runtime

    longest = max(args.prompt_length)
    if args.random is None:
        name = model_name(args)
        checkpoint = open_checkpoint(name, **overrides(args))
        length = models.needed_length(checkpoint.config, longest, args.steps)
        settings = {"dtype": args.dtype, "cache_dtype": args.cache_dtype, "max_length": length}
        settings |= {"packed": packed(args), "mesh": mesh(args)}
        lm, loading = measure_loading(lambda: load_checkpoint(checkpoint, **settings))
        return lm.model, lm.params, name, checkpoint.path, loading
    config = published(args.random)
    if args.quantize == "mxfp4":
        config = dataclasses.replace(config, mxfp4="all")
    elif args.quantize is not None:
        config = quantized(config, weights_by_path(abstract_params(registry.build(config))), args.quantize)
    length = models.needed_length(config, longest, args.steps)
    runtime.enable_compilation_cache()
    model = registry.build(config, dtype=runtime.compute_dtype(args.dtype), cache_dtype=args.cache_dtype)
    sizes = mesh(args)
    if sizes is not None:
        model = on_mesh(model, sizes)
    memory.check(model, batch=max(args.batch), max_length=length)
    make, pack = (random_params, repacked) if sizes is None else (shards.random_params, shards.repacked)
    params, loading = measure_loading(lambda: pack(model, make(model)))
    title = f"{args.random} (random weights{f' in {args.quantize}' if args.quantize else ''})"
    return model, params, title, None, loading


def _print_head(title: str, loading: "Loading", speed: "MemorySpeed") -> None:
    from gptjax.support.units import readable

    print(
        f"{title}; loaded in {loading.seconds:.1f} s, growing host memory by {readable(loading.host_bytes)}; "
        f"memory reads at {readable(int(speed.read))}/s and copies at {readable(int(speed.copy))}/s"
    )
    heads = ("rows prompt  prefill tok/s  spread", "ms/step  spread  decode tok/s", "of ceiling  compile      peak")
    print(f"engine        {'   '.join(heads)}", flush=True)


def _print_rows(results: "Sequence[Result]", ceiling: float) -> None:
    """The lines of one size: an engine each, and how the first compares with the other."""
    from gptjax.support.units import readable

    for result in results:
        share = result.share(ceiling)
        noisy = [part for part, figure in (("prefill", result.prefill), ("decode", result.step)) if figure.noisy]
        print(
            f"{result.engine:12} {result.batch:5} {result.prompt_length:6} {result.prefill_tokens_per_second:14.0f} "
            f"{result.prefill.spread / result.prefill.median:7.0%} {1e3 * result.step.median:9.3f} "
            f"{result.step.spread / result.step.median:7.0%} {result.decode_tokens_per_second:13.1f}  "
            + (f"{share:10.0%} {result.compile:6.1f} s" if share is not None else f"{'':10} {'':8}")
            + f" {readable(result.peak_memory):>9}"
            + (f"  noise in {' and '.join(noisy)}: small differences mean nothing" if noisy else ""),
            flush=True,
        )
    for mine, theirs in itertools.pairwise(results):
        decode = mine.decode_tokens_per_second / theirs.decode_tokens_per_second
        prefill = mine.prefill_tokens_per_second / theirs.prefill_tokens_per_second
        print(
            f"{mine.batch} rows: {decode:.2f} times the decode rate of {theirs.engine}, "
            f"{prefill:.2f} times the prefill rate",
            flush=True,
        )
