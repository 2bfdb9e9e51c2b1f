"""Throughput against latency."""

from collections.abc import Sequence
from pathlib import Path

from gptjax.bench.serving.result import Result, percentile
from gptjax.support.plots import check_plot, save_plot


def plot(results: Sequence[Result], path: str | Path, *, title: str) -> None:
    """Plots output tokens per second, and the medians and 99th percentiles of first tokens and gaps.

    Raises:
      RequestError: matplotlib is not installed, or the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    picture = Figure(figsize=(9, 4.5), layout="constrained")
    for axes, name, label in (
        (picture.add_subplot(1, 2, 1), "first", "first token after"),
        (picture.add_subplot(1, 2, 2), "gaps", "between two events"),
    ):
        rates = [result.output_rate for result in results]
        for share, style in ((50, "o-"), (99, "s--")):
            latencies = [1e3 * percentile(getattr(result, name), share) for result in results]
            axes.plot(rates, latencies, style, label=f"p{share}")
        for result in results:
            text = f"{result.load.clients} clients" if result.load.clients else f"{result.load.rate:g}/s"
            axes.annotate(text, (result.output_rate, 1e3 * percentile(getattr(result, name), 50)))
        axes.set(xlabel="output tokens per second", ylabel=f"{label}, ms", xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend()
    picture.suptitle(title)
    save_plot(picture, path)
