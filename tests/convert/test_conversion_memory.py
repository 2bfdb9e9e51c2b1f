"""The memory that a conversion takes at its highest, with and without quantization."""

import shutil

import numpy as np
import pytest

from gptjax.checkpoints import saving, weights
from gptjax.checkpoints.manifest import read_manifest
from tests.convert import made
from tests.convert.conversion_material import streamed
from tests.convert.peak import peak
from tests.thinned import thorough


@pytest.mark.parametrize("dtype", [None, thorough("bfloat16")])
def test_memory_is_bounded(tmp_path, dtype):
    """390 MB, of which the largest tensor is 61: a piece and a tensor may be held, the whole may not."""
    made.stream_gpt2(tmp_path / "src", vocab_size=12000, n_positions=64, n_embd=1280, n_layer=4, n_head=10)
    total = (tmp_path / "src" / "model.safetensors").stat().st_size
    limit = saving.PIECE_BYTES + 12000 * 1280 * 4 + 100_000_000
    assert limit < 0.8 * total
    assert peak(tmp_path / "src", tmp_path / "dst", dtype=dtype) <= limit
    if dtype is None:  # and back: the largest tensor, a copy of a piece of it, and what the reader keeps for the next
        largest = 12000 * 1280 * 4
        assert peak(tmp_path / "dst", tmp_path / "back", function="export") <= 2 * largest + 40_000_000
        assert peak(tmp_path / "src", tmp_path / "again", function="export") <= largest + 40_000_000
    for directory in tmp_path.iterdir():
        shutil.rmtree(directory)


@pytest.mark.slow
def test_memory_is_bounded_for_gpt2_xl(tmp_path):
    """6.2 GB, twice: peak within the largest tensor (322 MB) and 500 MB, and the result bit-equal."""
    count = made.stream_gpt2(tmp_path / "src", vocab_size=50257, n_positions=1024, n_embd=1600, n_layer=48, n_head=25)
    assert count == 1_557_611_200
    try:
        most = peak(tmp_path / "src", tmp_path / "dst")
        print(f"peak over baseline: {most / 1e6:.0f} MB")
        assert most <= 50257 * 1600 * 4 + 500_000_000
        stored = weights.readers(tmp_path / "dst", read_manifest(tmp_path / "dst"))
        source = streamed(tmp_path / "src")
        for path, read in stored:
            assert np.array_equal(source.pop("/".join(path)), read())
        assert not source
    finally:
        shutil.rmtree(tmp_path / "src")
        shutil.rmtree(tmp_path / "dst", ignore_errors=True)


@pytest.mark.thorough
def test_memory_is_bounded_when_weights_are_rounded(tmp_path):
    """400 MB, of which the largest tensor is 164: less than that one, as neither is ever held in float32."""
    made.stream_gpt2(tmp_path / "src", vocab_size=32000, n_positions=64, n_embd=1280, n_layer=3, n_head=10)
    before = """
import numpy
from convert.mxfp4 import rounded
rounded(("token_embedding",), [numpy.ones((64, 32), numpy.float32)], (64, 32))  # what JAX takes for itself
"""
    assert peak(tmp_path / "src", tmp_path / "dst", before=before, quantize="all") <= 150_000_000
