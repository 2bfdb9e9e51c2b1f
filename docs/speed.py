"""Draws decoding speed against rows, and what the memory allows, from files that `gptjax bench --json` wrote.

python docs/speed.py docs/bench/*.json docs/images/speed.svg
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

Point = Mapping[str, Any]  # one model, rows and prompt length: a result of `gptjax bench --json`, with its run's facts
_FACTS = ("model", "device", "dtype")
_RESULT = ("engine", "batch", "prompt_length", "step", "decode_tokens_per_second", "share_of_ceiling")


def read(files: Iterable[Path]) -> list[Point]:
    """All results of all files. Raises `SystemExit` for a file that holds something else."""
    points: list[Point] = []
    for file in files:
        try:
            run = json.loads(file.read_text(encoding="utf-8"))
            facts = {name: run[name] for name in _FACTS}
            points += [facts | {name: result[name] for name in _RESULT} for result in run["results"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{file} is not what `gptjax bench MODEL --json` prints ({error!r})") from None
    return points


def lines(points: Iterable[Point]) -> dict[tuple[str, str], list[Point]]:
    """The points of each line, by rows; a line has a model, dtype and prompt length, and an engine."""
    found: dict[tuple[str, str], list[Point]] = {}
    for point in sorted(points, key=lambda point: point["batch"]):
        name = f"{point['model']}, {point['dtype']}, prompt of {point['prompt_length']}"
        found.setdefault((name, point["engine"]), []).append(point)
    return found


def ceiling(point: Point) -> float | None:
    """Tokens a second if a step took no longer than reading what it must; None if that is not known."""
    share = point["share_of_ceiling"]
    return point["decode_tokens_per_second"] / share if share else None


def draw(points: Sequence[Point], picture: Path) -> None:
    """One panel for each device; a point is the median, a bar the spread, a dashed line the ceiling."""
    matplotlib.rcParams["svg.hashsalt"] = "gptjax"  # the same file from the same measurements
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text, in half the bytes
    devices = sorted({point["device"] for point in points})
    figure = Figure(figsize=(8 * len(devices), 8), layout="constrained")
    for axes, device in zip(figure.subplots(1, len(devices), squeeze=False).flat, devices, strict=True):
        axes.set(xscale="log", yscale="log", xlabel="rows", ylabel="tokens/s, all rows together", title=device)
        drawn = lines(point for point in points if point["device"] == device)
        colours = {name: f"C{index % 10}" for index, name in enumerate(dict.fromkeys(name for name, _ in drawn))}
        for (name, engine), line in drawn.items():
            _line(axes, line, f"{name}: {engine}", colours[name], "o" if engine == "gptjax" else "s")
        rows = sorted({point["batch"] for line in drawn.values() for point in line})
        axes.set_xticks(rows, [str(row) for row in rows])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.plot([], [], "--", color="gray", label="what the memory allows, measured in the same run")
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(0, -0.09))  # below, where no line is
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)


def _line(axes: Any, line: Sequence[Point], label: str, colour: str, marker: str) -> None:
    rows, rates = ([point[name] for point in line] for name in ("batch", "decode_tokens_per_second"))
    slowest, fastest = ([point["batch"] / end(point["step"]["seconds"]) for point in line] for end in (max, min))
    spread = [
        [rate - least for rate, least in zip(rates, slowest, strict=True)],
        [most - rate for rate, most in zip(rates, fastest, strict=True)],
    ]
    axes.errorbar(rows, rates, spread, marker=marker, color=colour, capsize=3, label=label)
    known = [(point["batch"], most) for point in line if (most := ceiling(point)) is not None]
    if known:
        axes.plot(*zip(*known, strict=True), "--", color=colour, alpha=0.6)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    *files, picture = (Path(argument) for argument in sys.argv[1:])
    draw(read(files), picture)
