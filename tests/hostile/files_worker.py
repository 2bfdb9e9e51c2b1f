"""Reads every hand-made file: `python -m tests.hostile.files_worker DIRECTORY`. Prints each one's outcome, in order."""

import json
import sys
from pathlib import Path

from tests.hostile.files import CASES, GROUPS, made_in
from tests.hostile.formats import FORMATS
from tests.hostile.limits import attempt, limit_memory, watch


def main(directory: str) -> None:
    watch()
    places = [made_in(Path(directory), group, name) for group, name in CASES]
    sound = Path(directory) / "sound"
    for form in FORMATS.values():  # what libraries take for themselves
        (sound := sound / "x").mkdir(parents=True)
        form.make(sound)
        attempt(form.read, sound)
    limit_memory()
    print(json.dumps([attempt(GROUPS[group].read, place) for (group, _), place in zip(CASES, places, strict=True)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
