"""Each hand-made hostile file gets its error, soon and in little memory; the process that reads all of them lives."""

import sys
from pathlib import Path

import pytest

from tests.hostile.files import CASES, GROUPS
from tests.hostile.limits import SECONDS, Outcome, in_a_process


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Outcome]:
    directory: Path = tmp_path_factory.mktemp("hostile")
    found = in_a_process("tests.hostile.files_worker", directory)
    return {case: Outcome(*outcome) for case, outcome in zip(CASES, found, strict=True)}


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limits")
@pytest.mark.parametrize(("group", "name"), CASES, ids=[f"{group}: {name}" for group, name in CASES])
def test_hostile_file(outcomes: dict[tuple[str, str], Outcome], group: str, name: str) -> None:
    kind, said, seconds = outcomes[group, name]
    assert kind not in ("read", "crashed"), said
    assert GROUPS[group].rows[name].said in said
    assert GROUPS[group].file in said or "…" in said  # a path that is too long to be shown
    assert seconds < SECONDS
    assert len(said) < 6000 and "\x1b" not in said
