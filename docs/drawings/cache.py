"""What is stored where in the cache: a full layer by position, a sliding layer as a ring; from the cache itself."""

import jax.numpy as jnp
import numpy as np
from attention import legend, mask
from svg import Drawing

from gptjax.layers.cache import KVCache
from pallas_kernels.attention.reference import visible

WINDOW, LENGTHS, CHUNK = 8, (5, 13, 22), 4  # GPT-OSS's window of 128, scaled down; rows; tokens of a chunk
_FULL, _SLIDING = 0, 1  # layers
_LEFT, _CELL, _SHOWN = 20, 28, 24  # pixels; places that are drawn of a full layer
_LEGEND = {
    "new": "the latest token, or the query itself",
    "attention": "earlier tokens",
    "empty": "empty, or not visible",
}


def _after(length: int) -> KVCache:
    """A one-row cache with this many tokens."""
    cache = KVCache.create(
        windows=(None, WINDOW), batch=1, max_length=_SHOWN, num_kv_heads=1, head_width=1, dtype=jnp.float32
    )
    positions_BT = jnp.arange(length)[None]
    new_BTKH = jnp.zeros((1, length, 1, 1))
    for layer in (_FULL, _SLIDING):
        _, cache = cache.update(layer, new_BTKH, new_BTKH, positions_BT)
    return cache.extended(positions_BT)


def attended(cache: KVCache, layer: int, positions: range) -> np.ndarray:
    """The position of each place [S] that queries at these positions attend to; -1 for none."""
    new_BTKH = jnp.zeros((1, len(positions), 1, 1))
    (_, _, positions_BS), _ = cache.update(layer, new_BTKH, new_BTKH, jnp.asarray([positions]))
    return np.asarray(positions_BS[0])


def _kind(position: int, latest: int) -> str:
    return "empty" if position < 0 else "new" if position == latest else "attention"


def _full(drawing: Drawing, top: float) -> None:
    drawing.text(_LEFT, top, "A layer without a window", "bold", anchor="start")
    drawing.text(_LEFT + 210, top, "[B, K, S, H]: position p is stored at index p", "faint", anchor="start")
    for row, length in enumerate(LENGTHS):
        y = top + 20 + row * (_CELL + 4)
        drawing.text(_LEFT, y + _CELL / 2, f"row {row}, {length} tokens", "small", anchor="start")
        latest = length - 1
        places = attended(_after(latest), _FULL, range(latest, length))
        for place, position in enumerate(places[:_SHOWN]):
            x = _LEFT + 110 + place * _CELL
            drawing.cell(x, y, _CELL, _kind(position, latest))
            if position >= 0:
                drawing.text(x + _CELL / 2, y + _CELL / 2, str(position), "small")
        drawing.text(_LEFT + 118 + _SHOWN * _CELL, y + _CELL / 2, "… S − 1", "small faint", anchor="start")


def _rings(drawing: Drawing, top: float) -> None:
    drawing.text(_LEFT, top, "A layer with a window", "bold", anchor="start")
    what = f"[B, K, {WINDOW}, H] here, [B, K, 128, H] in GPT-OSS: position p is stored at index p mod {WINDOW}"
    drawing.text(_LEFT + 210, top, what, "faint", anchor="start")
    for row, length in enumerate(LENGTHS):
        x, y, latest = 150 + row * 280, top + 120, length - 1
        for place, position in enumerate(attended(_after(latest), _SLIDING, range(latest, length))):
            turns = (place / WINDOW, (place + 1) / WINDOW)
            drawing.sector(x, y, (42, 80), turns, _kind(position, latest))
            if position >= 0:
                drawing.text(*_around(x, y, 61, sum(turns) / 2), str(position))
            drawing.text(*_around(x, y, 92, sum(turns) / 2), str(place), "small faint")
        drawing.text(x, y - 8, f"row {row}", "small")
        drawing.text(x, y + 8, f"{length} tokens", "small")


def _around(x: float, y: float, radius: float, turn: float) -> tuple[float, float]:
    angle = 2 * np.pi * turn
    return round(x + radius * np.sin(angle), 1), round(y - radius * np.cos(angle), 1)


def _chunk(drawing: Drawing, top: float) -> None:
    length = LENGTHS[-1]
    positions = range(length, length + CHUNK)
    drawing.text(_LEFT, top, f"A chunk of {CHUNK} tokens and a window", "bold", anchor="start")
    what = "the chunk attends to the ring as it was and to itself, and is then written"
    drawing.text(_LEFT + 290, top, what, "faint", anchor="start")
    places = attended(_after(length), _SLIDING, positions)
    seen_TS = np.asarray(visible(jnp.asarray([positions]), jnp.asarray(places[None]), WINDOW)[0])
    itself_TS = np.asarray(positions)[:, None] == places
    left = _LEFT + 110
    drawing.text(left + WINDOW * _CELL / 2, top + 24, "ring, by index", "small faint")
    drawing.text(left + (WINDOW + CHUNK / 2) * _CELL, top + 24, "chunk", "small faint")
    for s, position in enumerate(places):
        drawing.text(left + (s + 0.5) * _CELL, top + 42, str(position), "small")
    for t, position in enumerate(positions):
        drawing.text(left - 8, top + 55 + (t + 0.5) * _CELL, f"query {position}", "small", anchor="end")
    mask(drawing, left, top + 55, seen_TS, itself_TS, _CELL)
    oldest = length - WINDOW + 1
    said = [
        f"Query {length} sees {WINDOW} positions, {oldest} to {length}.",
        f"Had the chunk been written first, {oldest + WINDOW} would have",
        f"replaced {oldest}, which query {length} still needs.",
    ]
    for line, words in enumerate(said):
        drawing.text(left + (WINDOW + CHUNK) * _CELL + 24, top + 80 + 20 * line, words, "faint", anchor="start")


def draw() -> Drawing:
    """Both kinds of layers, and a chunk that meets a ring."""
    drawing = Drawing(900, 624, "The cache: layers without a window by position, layers with one as rings")
    _full(drawing, 24)
    _rings(drawing, 172)
    _chunk(drawing, 412)
    legend(drawing, _LEFT, 602, _LEGEND, 14)
    return drawing
