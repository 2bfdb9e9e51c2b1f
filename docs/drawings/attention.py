"""What a query may look at: the masks of both models, from the function that makes them."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from svg import Drawing

from pallas_kernels.attention.reference import visible

T, WINDOW = 12, 4  # tokens, and the window: GPT-OSS's 128, scaled down
_CELL, _PANEL, _LEFT, _TOP = 13, 224, 20, 76
_LEGEND = {"new": "itself", "attention": "visible", "empty": "not visible", "sink": "the sink: a score without a value"}


def legend(drawing: Drawing, x: float, y: float, names: dict[str, str], cell: float) -> None:
    """What the colours mean, in a row."""
    for kind, words in names.items():
        drawing.cell(x, y - cell / 2, cell, kind)
        drawing.text(x + cell + 6, y, words, "small", anchor="start")
        x += cell + 30 + 6.5 * len(words)


def mask(drawing: Drawing, x: float, y: float, seen_TS: np.ndarray, itself_TS: np.ndarray, cell: float) -> None:
    """A row for each query, a column for each key."""
    for t, row in enumerate(seen_TS):
        for s, seen in enumerate(row):
            kind = "empty" if not seen else "new" if itself_TS[t, s] else "attention"
            drawing.cell(x + cell * s, y + cell * t, cell, kind)


def _panel(
    drawing: Drawing, left: float, title: Sequence[str], positions: Sequence[int], window: int | None, sink: bool
) -> None:
    for line, words in enumerate(title):
        drawing.text(left, 22 + 17 * line, words, "" if line else "bold", anchor="start")
    positions_1T = jnp.asarray([positions], jnp.int32)
    seen_TS = np.asarray(visible(positions_1T, positions_1T, window)[0])
    for t in range(T if sink else 0):
        drawing.cell(left, _TOP + _CELL * t, _CELL, "sink")
    mask(drawing, left + (_CELL + 5) * sink, _TOP, seen_TS, np.eye(T, dtype=bool), _CELL)


def draw() -> Drawing:
    """Four masks side by side."""
    height = _TOP + T * _CELL
    drawing = Drawing(900, height + 66, "Masks of attention: causal, with a sink, with a sliding window, with padding")
    everything = list(range(T))
    panels = [
        (("GPT-2", "itself and all before it"), everything, None, False),
        (("GPT-OSS, blocks 1, 3, 5, …", "itself and all before it,", "and the sink"), everything, None, True),
        (
            ("GPT-OSS, blocks 0, 2, 4, …", f"the last {WINDOW} (128 in GPT-OSS),", "and the sink"),
            everything,
            WINDOW,
            True,
        ),
        (("Padding", "a chunk of 9 tokens,", f"padded to {T}"), [*range(T - 3), -1, -1, -1], None, False),
    ]
    for column, panel in enumerate(panels):
        _panel(drawing, _LEFT + column * _PANEL, *panel)
    axes = "One row for each query (T), one column for each key (S)."
    drawing.text(_LEFT, height + 18, axes, "small faint", anchor="start")
    legend(drawing, _LEFT, height + 42, _LEGEND, _CELL)
    return drawing
