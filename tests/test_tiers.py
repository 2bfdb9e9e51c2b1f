"""The tiers of conftest.py."""

import itertools

from tests import conftest


def test_what_the_lists_name_exists():
    """A name that is stale would put what compiles for minutes among the quick tests, or compile it otherwise."""
    left_out = set().union(*conftest.TIERS.values(), conftest.OPTIMIZED, conftest.COMPARED, *conftest.TOGETHER.values())
    assert [name for name in left_out if not (conftest.ROOT / "tests" / name).exists()] == []


def test_no_two_files_of_tests_have_the_same_name():
    """pytest imports them by their bare names, and refuses the second one."""
    names = sorted(path.name for path in (conftest.ROOT / "tests").rglob("test_*.py"))
    assert [name for name, after in itertools.pairwise(names) if name == after] == []
