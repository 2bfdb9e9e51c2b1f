"""The pages of docs/ and the README, and what they are made of."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.thinned import thinned

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
_IDS = [page.name if page.parent != ROOT else "root" for page in PAGES]
_LONG = ("forward-pass.md", "gpt-oss.md", "quantization.md")  # what they show compiles for up to a minute
_SHORT = [page for page in PAGES if page.name not in _LONG]
each_page = pytest.mark.parametrize("page", PAGES, ids=_IDS)
each_page_to_run = pytest.mark.parametrize("page", thinned(PAGES, *_SHORT), ids=_IDS)
# The README's commands together compile for as long as a page that is long.
each_page_of_commands_to_run = pytest.mark.parametrize(
    "page", thinned(PAGES, *(page for page in _SHORT if page.parent != ROOT)), ids=_IDS
)


@dataclasses.dataclass(frozen=True)
class Fence:
    """A fenced part of a page."""

    language: str
    comment: str  # of the HTML comment right above it
    line: int  # where its text begins, from 1
    text: str

    @property
    def skipped(self) -> str | None:
        return self.comment.removeprefix("not run: ") if self.comment.startswith("not run: ") else None


def fences(page: Path) -> Iterator[Fence]:
    lines = page.read_text().splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if line.startswith("```") and start is None:
            start = number
        elif line == "```" and start is not None:
            above = re.fullmatch(r"<!-- (.*) -->", lines[start - 1])
            text = "\n".join(lines[start + 1 : number])
            yield Fence(lines[start][3:], above[1] if above else "", start + 2, text)
            start = None
    assert start is None, f"{page} has a fence without an end"


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def squeezed(text: str) -> str:
    return " ".join(text.split())
