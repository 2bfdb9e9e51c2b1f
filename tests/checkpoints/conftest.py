"""A converted directory, for the tests of what is stored."""

from pathlib import Path

import pytest


@pytest.fixture
def saved(tmp_path, monkeypatch) -> Path:
    """A directory of several pieces."""
    from gptjax.checkpoints import saving
    from tests.checkpoints.weights_material import save

    monkeypatch.setattr(saving, "PIECE_BYTES", 110)
    save(tmp_path / "dst")
    return tmp_path / "dst"
