"""A converted directory, for the tests of what is stored."""

from pathlib import Path

import pytest


@pytest.fixture
def saved(tmp_path, monkeypatch) -> Path:
    """A directory of several pieces."""
    from gptjax.checkpoints import weights
    from tests.checkpoints.weights_material import save

    monkeypatch.setattr(weights, "PIECE_BYTES", 110)
    save(tmp_path / "dst")
    return tmp_path / "dst"
