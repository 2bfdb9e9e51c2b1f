"""Small valid files of each format with random changes: something comes out, or a named error, soon, in little memory.

GGUF's tensors have a test of their own (tests/gguf/test_fuzz.py), as have whole directories, down to the weights
(tests/checkpoints/test_fuzz_directories.py).
"""

import sys
from typing import Any

import pytest

from tests.fuzz import TIMES
from tests.hostile.formats import FORMATS
from tests.hostile.limits import SECONDS, in_a_process


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_a_process("tests.hostile.fuzz_worker", tmp_path_factory.mktemp("fuzz"), 17, TIMES)


@pytest.mark.fuzz
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limits")
@pytest.mark.parametrize("name", FORMATS)
def test_changed_files_of(found: dict[str, Any], name: str) -> None:
    result = found[name]
    assert not result["failures"], "\n".join(result["failures"])
    assert result["slowest"] < SECONDS
    if name != "journal":  # of which whatever is wrong is done again
        assert result["refused"] > result["tried"] / 4
