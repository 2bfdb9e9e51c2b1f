"""The roofline plot of measured kernels."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from gptjax.bench.kernels import Ceilings, KernelResult
from gptjax.support.plots import check_plot, save_plot
from gptjax.support.units import readable


def plot(results: Sequence[KernelResult], ceilings: Ceilings, path: str | Path, *, title: str) -> None:
    """Plots the roofline: operations a second against operations per byte, below the device's limits.

    Raises:
      RequestError: matplotlib is not installed, or the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure as Picture  # without pyplot: no window, no global state

    picture = Picture(figsize=(9, 6), layout="constrained")
    axes = picture.add_subplot(xscale="log", yscale="log")
    ridge = ceilings.flops / ceilings.bytes_per_second
    left = min([ridge, *(result.intensity for result in results)]) / 2
    right = max([ridge, *(result.intensity for result in results)]) * 4
    roof = [ceilings.bytes_per_second * left, ceilings.flops, ceilings.flops]
    label = f"{readable(int(ceilings.bytes_per_second))}/s, {ceilings.flops / 1e12:.3g} TFLOP/s, measured"
    axes.plot([left, ridge, right], roof, color="black", label=label)
    operations, names = (
        sorted(set(each)) for each in zip(*((r.case.operation, r.implementation) for r in results), strict=True)
    )
    for (row, operation), (column, name) in itertools.product(enumerate(operations), enumerate(names)):
        points = [
            (result.intensity, result.flops_per_second)
            for result in results
            if (result.case.operation, result.implementation) == (operation, name)
        ]
        if points:
            marker, color = "os^D"[row % 4], f"C{column}"
            axes.scatter(
                *zip(*points, strict=True), marker=marker, color=color, alpha=0.7, label=f"{operation}, {name}"
            )
    axes.set(xlabel="FLOP per byte that must be read", ylabel="FLOP/s", title=title)
    axes.grid(which="major", alpha=0.3)
    axes.legend()
    save_plot(picture, path)
