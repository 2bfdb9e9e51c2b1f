"""Mutates each format's files and reads them: `python -m tests.hostile.fuzz_worker DIRECTORY SEED TIMES`.

Prints, by format, how many were tried, how many refused, the slowest's seconds, and the first few failures.
"""

import json
import random
import sys
from pathlib import Path

from tests.hostile.formats import FORMATS, Format
from tests.hostile.limits import attempt, limit_memory, unlimit_memory, watch
from tests.hostile.mutations import changed

LONGEST = 20_000  # characters of an error


def fuzzed(directory: Path, name: str, form: Format, seed: str, count: int) -> dict[str, object]:
    directory.mkdir()
    form.make(directory)
    files = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    originals = {file: (directory / file).read_bytes() for file in files}
    first = attempt(form.read, directory)  # what libraries take for themselves
    failures = [first.said] if first.kind == "crashed" or (first.kind != "read" and name != "pickle") else []
    refused, slowest = 0, 0.0
    limit_memory()
    for number in range(count):
        pick = random.Random(f"{seed} {name} {number}")
        chosen = pick.sample(files, min(len(files), pick.choice((1, 1, 1, 2))))
        for file in chosen:
            overwrite(directory / file, changed(pick, file, originals[file]))
        kind, said, seconds = attempt(form.read, directory)
        slowest = max(slowest, seconds)
        refused += kind not in ("read", "crashed")
        if kind == "crashed" or len(said) > LONGEST or "\x1b" in said:
            failures.append(f"{seed} {name} {number}, {chosen}: {kind} {said[-2000:]}")
        for file in chosen:
            overwrite(directory / file, originals[file])
    unlimit_memory()
    return {"tried": count, "refused": refused, "slowest": round(slowest, 3), "failures": failures[:5]}


def overwrite(path: Path, data: bytes) -> None:
    """Without emptying the file before: such a file is written to the disk at once, which takes most of the time."""
    with open(path, "r+b") as file:
        file.write(data)
        file.truncate()


def main(directory: str, seed: str, times: str) -> None:
    watch()
    found = {
        name: fuzzed(Path(directory) / name, name, form, seed, max(20, round(form.count * float(times))))
        for name, form in FORMATS.items()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
