"""MXFP4 against transformers' dequantizer of GPT-OSS's experts, live."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.formats.mxfp4 import MXFP4

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("transformers.integrations.mxfp4")

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]  # torch's and transformers' own warnings


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_reads_the_same_numbers(dtype):
    rng = np.random.default_rng(0)
    E, F, blocks_of_D = 3, 10, 5
    blocks_EF = rng.integers(0, 256, (E, F, blocks_of_D, 16), dtype=np.uint8)
    scales_EF = rng.integers(2, 253, (E, F, blocks_of_D), dtype=np.uint8)
    want_EDF = theirs.convert_moe_packed_tensors(
        torch.from_numpy(blocks_EF), torch.from_numpy(scales_EF), dtype=getattr(torch, dtype)
    )
    got_EFD = np.asarray(MXFP4.of(blocks_EF, scales_EF).dequantize(jnp.dtype(dtype)))
    want_EFD = want_EDF.to(torch.float32).numpy().transpose(0, 2, 1)  # theirs is transposed, for x @ w
    assert got_EFD.dtype == (np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    np.testing.assert_array_equal(got_EFD.astype(np.float32), want_EFD)
    np.testing.assert_array_equal(np.signbit(got_EFD.astype(np.float32)), np.signbit(want_EFD))
