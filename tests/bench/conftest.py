"""Measurements that take no time."""

import pytest


@pytest.fixture
def short(monkeypatch) -> None:
    """Little of everything: what is measured here is not looked at."""
    from gptjax.bench import kernels

    monkeypatch.setattr(kernels, "_MOST_CALLS", 3)
    monkeypatch.setattr(kernels, "_RUN_SECONDS", 1e-4)
