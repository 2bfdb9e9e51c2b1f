"""`gptjax bench --kernels` and `--tune`."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptjax.bench.cases import Case
    from gptjax.bench.kernels import Ceilings, KernelResult, NotRun
    from gptjax.config import ModelConfig

_HEADS = f"{'operation':9}  {'shape':50}   rows  by       {'µs':>10}  spread      GB/s  of ceiling  TFLOP/s    error"


def run(args: argparse.Namespace, models: "dict[str, ModelConfig]") -> int:
    """Runs the command for the shapes of these models."""
    import jax

    from gptjax.bench import cases
    from gptjax.errors import RequestError
    from gptjax.support import runtime
    from gptjax.support.plots import check_plot

    operations = args.kernels or cases.OPERATIONS
    for unknown in set(operations) - set(cases.OPERATIONS):
        there = ", ".join(cases.OPERATIONS)
        raise RequestError(f"unknown operation {unknown!r}; choose from {there}; a model's name goes before --kernels")
    if args.plot is not None:
        check_plot(args.plot)
    runtime.enable_compilation_cache()
    device, dtype = jax.devices()[0].device_kind, runtime.compute_dtype(args.dtype).name
    # On a CPU, experts for thousands of rows take minutes; kernels for these have no settings to tune.
    prompts = args.tune is None and jax.default_backend() != "cpu"
    chosen = cases.cases(
        models,
        dtype=dtype,
        operations=operations,
        rows=args.batch,
        positions=args.prompt_length,
        prompts=prompts,
        cache_dtype=args.cache_dtype,
    )
    if not chosen:
        raise RequestError(
            f"{', '.join(models)} has none of {', '.join(operations)}, or too few positions; choose others"
        )
    if args.tune is not None:
        return _tune(chosen, args.tune, device, repeats=args.repeats)
    return _measure(chosen, args, device, dtype)


def _measure(cases: "dict[Case, list[str]]", args: argparse.Namespace, device: str, dtype: str) -> int:
    import jax

    from gptjax.bench import kernels, roofline

    ceilings = kernels.measure_ceilings(dtype)
    title = f"{dtype} on {device}, JAX {jax.__version__}"
    if not args.json:
        _print_ceilings(title, ceilings)
    results, not_run = [], []
    for each in kernels.run(cases, kernels.implementations(), repeats=args.repeats):
        if isinstance(each, kernels.KernelResult):
            results.append(each)
        else:
            not_run.append(each)
        if not args.json:
            _print(each, ceilings)
    if args.json:
        facts = {"device": device, "dtype": dtype, "jax": jax.__version__, **ceilings.to_json()}
        facts["results"] = [result.to_json(ceilings.bytes_per_second) for result in results]
        facts["not_run"] = [each.to_json() for each in not_run]
        print(json.dumps(facts))
    if args.plot is not None and results:
        roofline.plot(results, ceilings, args.plot, title=title)
    return 0 if results else 1


def _print_ceilings(title: str, ceilings: "Ceilings") -> None:
    from gptjax.support.units import readable

    print(
        f"{title}: memory reads at {readable(int(ceilings.read))}/s and copies at {readable(int(ceilings.copy))}/s, "
        f"a large matmul does {ceilings.flops / 1e12:.3g} TFLOP/s"
    )
    made = f"{1e6 * ceilings.link:.1f} µs to make an input from the last result"
    print(f"each time, except attention's and a block's, includes {made}")
    print(_HEADS, flush=True)


def _start(case: "Case", implementation: str) -> str:
    return f"{case.operation:9}  {case.shape:50}  {case.rows:5}  {implementation:7}"


def _print(each: "KernelResult | NotRun", ceilings: "Ceilings") -> None:
    from gptjax.bench.kernels import NotRun

    start = _start(each.case, each.implementation)
    if isinstance(each, NotRun):
        print(f"{start}  not run: {each.reason}", flush=True)
        return
    notes = ["noise"] * each.call.noisy + ["may come from a cache"] * each.cached
    print(
        f"{start}  {1e6 * each.call.median:10.2f}  {each.call.spread / each.call.median:6.0%}  "
        f"{each.bytes_per_second / 1e9:8.1f}  {each.bytes_per_second / ceilings.bytes_per_second:10.0%}  "
        f"{each.flops_per_second / 1e12:7.3g}  "
        f"{each.error:7.1e}  {', '.join(each.models)}" + "".join(f"; {note}" for note in notes),
        flush=True,
    )


def _tune(cases: "dict[Case, list[str]]", target: str, device: str, *, repeats: int) -> int:
    from gptjax.bench import kernels, tuning
    from gptjax.errors import RequestError
    from pallas_kernels import tiles

    file = Path(target) if target else tiles.path(device)
    if file.suffix != ".json" or not os.access(file if os.path.exists(file) else file.absolute().parent, os.W_OK):
        raise RequestError(f"{file} is not a writable .json file; name one, as in --tune tiles.json")
    try:
        tiles.read(file)  # to find its faults before the work is done
    except ValueError as error:
        raise RequestError(str(error)) from None
    attempts = []
    for case in cases:
        for name in kernels.implementations():
            for each in tuning.tune(case, name, repeats=repeats):
                if isinstance(each, kernels.NotRun):
                    print(f"{_start(case, name)}  not run: {each.reason}", flush=True)
                else:
                    attempts.append(each)
                    said = f"{1e6 * each.call.median:10.2f} µs  error {each.error:7.1e}  {each.settings}"
                    print(f"{_start(case, name)}  {said}", flush=True)
    entries = tuning.fastest(attempts)
    if not entries:
        raise RequestError(f"no kernel that runs on {device} has settings to tune; use a GPU that runs Pallas kernels")
    tiles.update(file, entries)
    print(f"{file}: wrote {len(entries)} of the {len(attempts)} settings that ran")
    return 0
