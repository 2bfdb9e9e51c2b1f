"""A small SVG writer: boxes, arrows and text, in colours that follow the reader's light or dark scheme."""

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

# class -> light colour, dark colour; `ink` colours are for strokes and text, the others for areas
_FILLS = {
    "page": ("#ffffff", "#0d1117"),
    "norm": ("#eef1f4", "#262c36"),
    "attention": ("#cbe5ff", "#0f3557"),
    "mlp": ("#ffe8d1", "#55300f"),
    "sink": ("#eadcff", "#43286e"),
    "empty": ("#eff2f5", "#1c222b"),
    "new": ("#54aeff", "#1f6feb"),
}
_INKS = {"ink": ("#1f2328", "#e6edf3"), "faint": ("#59636e", "#9ba4ae")}
_FONT = "ui-sans-serif,system-ui,'Segoe UI',Helvetica,Arial,sans-serif"


def _style() -> str:
    def rules(scheme: int) -> str:
        fills = "".join(f".{name}{{fill:{colours[scheme]}}}" for name, colours in _FILLS.items())
        ink, faint = (_INKS[name][scheme] for name in _INKS)
        lines = f"text,.head{{fill:{ink}}}text.faint{{fill:{faint}}}.line,.sum{{stroke:{ink}}}.edge{{stroke:{faint}}}"
        return fills + lines

    fixed = f"text{{font:13px {_FONT};dominant-baseline:central}}.edge{{stroke-width:1}}"
    fixed += ".small{font-size:11px}.large{font-size:16px;font-weight:600}.bold{font-weight:600}"
    fixed += ".line{fill:none}.line,.sum{stroke-width:1.4}.line.thick{stroke-width:3}"
    return f"<style>{fixed}{rules(0)}@media(prefers-color-scheme:dark){{{rules(1)}}}</style>"


class Drawing:
    """Collects shapes; coordinates are pixels from the top left."""

    def __init__(self, width: int, height: int, description: str) -> None:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        head += f'height="{height}" role="img" aria-label="{escape(description)}">'
        self._parts = [head, _style(), f'<rect class="page" width="{width}" height="{height}" rx="8"/>']

    def cell(self, x: float, y: float, size: float, kind: str) -> None:
        """A square of a table, coloured by its kind."""
        self._parts.append(f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{size - 1:g}" height="{size - 1:g}"/>')

    def text(self, x: float, y: float, words: str, kind: str = "", *, anchor: str = "middle") -> None:
        """One line of text, around (x, y) or beginning there; `kind` may be several classes."""
        look = f' class="{kind}"' if kind else ""
        self._parts.append(f'<text{look} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>')

    def box(self, x: float, y: float, width: float, height: float, lines: Sequence[str], kind: str) -> None:
        """A rectangle around (x, y) with lines of text; those after the first are small."""
        size = f'x="{x - width / 2:g}" y="{y - height / 2:g}" width="{width:g}" height="{height:g}"'
        self._parts.append(f'<rect class="{kind} edge" {size} rx="6"/>')
        for index, line in enumerate(lines):
            self.text(x, y + 16 * (index - (len(lines) - 1) / 2), line, "small" if index else "")

    def line(self, points: Sequence[tuple[float, float]], *, head: bool = True, thick: bool = False) -> None:
        """A line through points, with a head at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._parts.append(f'<polyline class="line{" thick" if thick else ""}" points="{path}"/>')
        if head:
            (x0, y0), (x, y) = points[-2:]
            length = math.hypot(x - x0, y - y0)
            dx, dy = (x - x0) / length, (y - y0) / length
            long, half = (14, 7) if thick else (9, 4.5)
            left, right = ((x - long * dx + s * dy, y - long * dy - s * dx) for s in (half, -half))
            corners = " ".join(f"{a:g},{b:g}" for a, b in ((x, y), left, right))
            self._parts.append(f'<polygon class="head" points="{corners}"/>')

    def plus(self, x: float, y: float) -> None:
        """The sign of a sum, in a circle."""
        self._parts.append(f'<circle class="page sum" cx="{x:g}" cy="{y:g}" r="10"/>')
        self.line([(x - 5, y), (x + 5, y)], head=False)
        self.line([(x, y - 5), (x, y + 5)], head=False)

    def __str__(self) -> str:
        return "\n".join([*self._parts, "</svg>", ""])
