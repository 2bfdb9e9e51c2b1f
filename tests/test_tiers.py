"""The tiers of conftest.py."""

from tests import conftest


def test_what_a_tier_leaves_out_exists():
    """A name that is stale would put what compiles for minutes among the quick tests."""
    left_out = set().union(*conftest.TIERS.values())
    assert [name for name in left_out if not (conftest.ROOT / "tests" / name).exists()] == []
