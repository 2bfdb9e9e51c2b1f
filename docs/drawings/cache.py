"""Which page of the pool each block of a row's positions lies in, with and without a window; from the cache itself."""

import jax.numpy as jnp
import numpy as np
from attention import legend
from svg import Drawing

from gptjax.layers.cache import PAGE, KVCache

WINDOW, CHUNK, LENGTHS, MOST = 128, 256, (100, 600, 1200), 1280  # the tokens of each row, and those it has room for
_FULL, _SLIDING = 0, 1  # layers
_LEFT, _FIRST, _CELL = 20, 150, 36  # pixels
_LEGEND = {
    "new": "the latest token is here",
    "attention": "its query sees this",
    "empty": "empty, or not visible",
}


def _cache() -> KVCache:
    return KVCache.create(
        windows=(None, WINDOW),
        batch=len(LENGTHS),
        max_length=MOST,
        num_kv_heads=1,
        head_width=1,
        dtype=jnp.float32,
        chunk=CHUNK,
    )


def _kinds(length: int, window: int | None) -> list[str]:
    """What the query of the latest token finds in each block of positions."""
    kinds = []
    first = 0 if window is None else max(length - window, 0)
    for block in range(MOST // PAGE):
        positions = range(block * PAGE, (block + 1) * PAGE)
        seen = positions.start < length and positions.stop > first
        kinds.append("new" if length - 1 in positions else "attention" if seen else "empty")
    return kinds


def _tables(drawing: Drawing, top: float, layer: int, title: str, what: str) -> None:
    cache = _cache()
    drawing.text(_LEFT, top, title, "bold", anchor="start")
    drawing.text(_LEFT + 210, top, what, "faint", anchor="start")
    for block in range(MOST // PAGE):
        drawing.text(_FIRST + (block + 0.5) * _CELL, top + 24, str(block * PAGE), "small faint")
    drawing.text(_LEFT, top + 24, "from position", "small faint", anchor="start")
    for row, length in enumerate(LENGTHS):
        y = top + 36 + row * (_CELL + 4)
        drawing.text(_LEFT, y + _CELL / 2, f"row {row}, {length} tokens", "small", anchor="start")
        table_Z = np.asarray(cache.table(layer))[row]
        for block, kind in enumerate(_kinds(length, cache.windows[layer])):
            x = _FIRST + block * _CELL
            drawing.cell(x, y, _CELL, kind)
            drawing.text(x + _CELL / 2, y + _CELL / 2, str(table_Z[block]), "small faint" if kind == "empty" else "")


def _pool(drawing: Drawing, top: float) -> None:
    """The pages of the layer with a window: whose they are, and what the rows' latest queries find in them."""
    cache = _cache()
    drawing.text(_LEFT, top, "Its pool of pages", "bold", anchor="start")
    what = f"[Y, K, {PAGE}, H], Y = {len(cache.k[_SLIDING])}: page 0 belongs to no row"
    drawing.text(_LEFT + 210, top, what, "faint", anchor="start")
    found = {}
    for row, length in enumerate(LENGTHS):
        table_Z = np.asarray(cache.table(_SLIDING))[row].tolist()
        found |= dict.fromkeys(table_Z, (row, "empty"))
        kinds = zip(table_Z, _kinds(length, WINDOW), strict=True)
        found |= {page: (row, kind) for page, kind in kinds if kind != "empty"}
    for page in range(len(cache.k[_SLIDING])):
        row, kind = found.get(page, (None, "empty"))
        x = _FIRST + page * _CELL
        drawing.cell(x, top + 16, _CELL, kind)
        drawing.text(x + _CELL / 2, top + 16 + _CELL / 2, str(page), "small faint" if kind == "empty" else "")
        if row is not None:
            drawing.text(x + _CELL / 2, top + 64, f"row {row}", "small faint")


def draw() -> Drawing:
    """Both kinds of layers, and the pool of one."""
    drawing = Drawing(700, 500, "The cache: the page of each block of positions, in layers without and with a window")
    what = "the page of each block of 128 positions"
    _tables(drawing, 24, _FULL, "A layer without a window", what)
    _tables(drawing, 206, _SLIDING, f"A layer with a window of {WINDOW}", "pages behind the window are used again")
    _pool(drawing, 388)
    legend(drawing, _LEFT, 482, _LEGEND, 14)
    return drawing
