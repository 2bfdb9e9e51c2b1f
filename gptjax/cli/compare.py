"""`gptjax compare` and `gptjax trace`."""

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from gptjax.cli.common import (
    MODEL_HELP,
    add_command,
    add_dtype,
    add_ignore_config,
    add_packed,
    model_name,
    overrides,
    packed,
)

if TYPE_CHECKING:
    import numpy as np

_PROMPT = "Once upon a time there was a king who had"


def add(commands: Any) -> None:
    """Declares the commands."""
    compare = add_command(
        commands,
        "compare",
        run_compare,
        summary="run gptjax and transformers side by side and compare every stage",
        epilog=_of_compare,
    )
    trace = add_command(
        commands,
        "trace",
        run_trace,
        summary="show every stage of the forward pass",
        epilog="examples:\n  gptjax trace gpt2-tales\n  gptjax trace gpt2-tales --values --prompt 'The sea'",
    )
    for parser in (compare, trace):
        parser.add_argument("model", nargs="?", help=MODEL_HELP)
        parser.add_argument("--prompt", default=_PROMPT, help="the text to run (default: the start of a fairy tale)")
        parser.add_argument("--ids", type=int, nargs="+", metavar="ID", help="token ids to run instead")
        parser.add_argument("--values", action="store_true", help="show the first eight values of each stage")
        parser.add_argument("--json", action="store_true", help="print one JSON object per stage")
        add_dtype(parser)
        add_packed(parser)
        add_ignore_config(parser)


def _of_compare() -> str:
    from gptjax.support.installation import with_extra  # slow to import, and reads what is installed

    return f"""Exits with 1 if a stage differs by more than the dtype explains, and names the first.
Computes in float32 unless --dtype says otherwise. Needs transformers and torch: {with_extra("oracle")}

examples:
  gptjax compare gpt2-tales
  gptjax compare ./my-gpt2 --prompt "The sea" --values --dtype float32"""


def run_compare(args: argparse.Namespace) -> int:
    """Runs `gptjax compare`."""
    from gptjax.api import load_checkpoint
    from gptjax.checkpoints.checkpoint import open_checkpoint
    from gptjax.diagnostics.transformers_comparison import compare, first_difference

    checkpoint = open_checkpoint(model_name(args), **overrides(args))
    lm = load_checkpoint(checkpoint, dtype=args.dtype or "float32", packed=packed(args))
    rows = compare(lm.model, lm.params, checkpoint.path, _ids(lm, args))
    width = max(len(row.stage) for row in rows)
    for row in rows:
        facts: dict[str, Any] = {"stage": row.stage, "ours": list(row.ours.shape), "theirs": list(row.theirs.shape)}
        facts |= {"difference": row.difference, "magnitude": row.magnitude, "agrees": row.agrees}
        facts["left_out"] = list(row.left_out)
        values = {"our_values": _head(row.ours), "their_values": _head(row.theirs)} if args.values else {}
        if args.json:
            print(json.dumps({key: _finite(value) for key, value in (facts | values).items()}))
            continue
        shapes = f"{_shape(row.ours):>15} {_shape(row.theirs):>15}"
        verdict = "" if row.agrees else "  <- differs"
        print(f"{row.stage:{width}} {shapes}  {row.difference:9.2e} of {row.magnitude:9.2e}{verdict}")
        for label, head in (("ours", values.get("our_values")), ("theirs", values.get("their_values"))):
            if head is not None:
                print(f"    {label:6} {_line(head)}")
    first = first_difference(rows)
    if not args.json:
        for position in rows[-1].left_out:
            stage = next(row.stage for row in rows if position in row.left_out)
            print(f"token {position} is left out from {stage} on: its experts are nearly tied, and rounding decides")
        others = " for the other tokens" if rows[-1].left_out else ""
        print(f"all stages agree{others}" if first is None else f"the first stage that differs: {first.stage}")
    return 0 if first is None else 1


def run_trace(args: argparse.Namespace) -> int:
    """Runs `gptjax trace`."""
    import numpy as np

    from gptjax.api import load

    lm = load(model_name(args), dtype=args.dtype, packed=packed(args), **overrides(args))
    stages = lm.activations(_ids(lm, args))
    width = max(map(len, stages))
    for stage, array in stages.items():
        wide = array.astype(np.float64)
        facts = {"mean": float(wide.mean()), "deviation": float(wide.std()), "largest": float(np.abs(wide).max())}
        values = {"values": _head(array)} if args.values else {}
        if args.json:
            row = {"stage": stage, "shape": list(array.shape)} | facts | values
            print(json.dumps({key: _finite(value) for key, value in row.items()}))
            continue
        numbers = "  ".join(f"{key} {value:10.3e}" for key, value in facts.items())
        print(f"{stage:{width}} {_shape(array):>15}  {numbers}")
        if args.values:
            print(f"    {_line(values['values'])}")
    return 0


def _ids(lm: Any, args: argparse.Namespace) -> list[int]:
    return args.ids if args.ids is not None else lm.tokenizer.prompt(args.prompt)


def _head(array: "np.ndarray") -> list[float]:
    return [float(value) for value in array.reshape(-1)[:8]]


def _shape(array: "np.ndarray") -> str:
    return "x".join(map(str, array.shape))


def _line(values: list[float]) -> str:
    return " ".join(f"{value:11.4e}" for value in values)


def _finite(value: Any) -> Any:
    """Makes NaN and infinities, which JSON lacks, null."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None
