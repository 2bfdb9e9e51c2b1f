"""Which models' requests have the same bits in any company, by device and kind."""

import dataclasses

import jax.numpy as jnp
import pytest

from gptjax.config import PUBLISHED
from gptjax.engine.free_of_load import is_exact_by_default, is_free_of_load
from gptjax.engine.pools import default_policy
from gptjax.engine.shared import SharedEngine
from gptjax.models import registry
from pallas_kernels import dispatch, same_bits


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(dispatch, "preferred", lambda: dispatch.MOSAIC)
    monkeypatch.setattr(dispatch, "_MOSAIC_SINCE", (0, 0))


def _model(
    name: str,
    *,
    dtype: str = "bfloat16",
    implementation: str = "auto",
    cache_dtype: str | None = None,
    **changes: object,
):
    config = dataclasses.replace(PUBLISHED[name], **changes)
    return registry.build(config, dtype=jnp.dtype(dtype), implementation=implementation, cache_dtype=cache_dtype)


@pytest.mark.parametrize("name", ["gpt-oss-20b", "gpt-oss-120b", "llama-3.1-8b", "qwen2.5-7b", "qwen3-0.6b"])
def test_on_hopper_a_model_whose_sums_have_kernels_computes_what_is_needed(hopper, name):
    model = _model(name)
    assert is_exact_by_default(model)
    policy = default_policy(model, slots=128)
    assert policy.row_sizes == (1, 2, 4, 8, 16, 32, 64, 128)
    assert policy.packed and policy.chunk_multiple == 1 and not policy.share_decoded
    # Up to 128 rows, a product has another order than beyond: a decode step's and no prompt's.
    assert policy.call_sizes == (256, 512, 1024, 2048)
    assert default_policy(model, slots=128, exact=False).call_sizes[0] == 32


def test_on_hopper_what_a_decode_steps_products_do_not_take_is_computed_as_before(hopper):
    model = _model("gpt-oss-20b")
    assert default_policy(model, slots=256).row_sizes == (256,)
    assert is_exact_by_default(model, rows=128) and not is_exact_by_default(model, rows=256)
    policy = default_policy(model, slots=8, chunk=128)
    assert policy.row_sizes == (1, 2, 4, 8) and policy.chunk_multiple == policy.chunk and not policy.packed


@pytest.mark.parametrize("name", ["gpt-oss-20b", "gpt2"])
def test_float8_changes_nothing_but_that_gpt2_has_one_class(hopper, name):
    """GPT-2's block as one kernel does not read such pages."""
    policy = default_policy(_model(name, cache_dtype="fp8"), slots=16)
    assert (policy.row_sizes, policy.packed, policy.call_sizes) == ((1, 2, 4, 8, 16), True, (256, 512, 1024, 2048))


@pytest.mark.parametrize("name", ["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"])
def test_on_hopper_gpt2_has_two_classes(hopper, name):
    """Up to eight rows, a block is one kernel. With more slots, no step has so few rows; speed is the default there."""
    model = _model(name)
    for slots, sizes in ((1, (1,)), (8, (1, 2, 4, 8)), (9, (9,)), (16, (16,)), (100, (16, 32, 64, 100)), (200, (200,))):
        assert is_exact_by_default(model, rows=slots) == (slots <= 8)
        assert is_free_of_load(model, rows=slots) == (slots <= 128)
        policy = default_policy(model, slots=slots)
        assert policy.row_sizes == sizes and policy.packed == (slots <= 128)
        assert default_policy(model, slots=slots, exact=False).row_sizes[0] == 1
    assert default_policy(model, slots=16).call_sizes[0] == 256
    assert default_policy(model, slots=16, chunk=128).row_sizes == (16,)


def test_without_max_batch_gpt2_keeps_the_class_that_a_call_has_rows_for(hopper):
    model = _model("gpt2")
    policies = {
        (slots, most): SharedEngine(model, max_length=64, max_batch=most).policy(slots)
        for slots, most in ((8, None), (32, None), (32, 32))
    }
    assert [each.rows for each in policies.values()] == ["needed", "asked", "needed"]
    assert [each.row_sizes[0] for each in policies.values()] == [1, 1, 16]
    assert all(policy.packed for policy in policies.values())
    assert SharedEngine(model, max_length=64, max_batch=None, exact=False).policy(32).rows == "needed"


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("gpt2", {"mxfp4": "linear"}),
        ("gpt2", {"width": 800}),
        ("gpt2", {"context_length": 8192}),  # the block's kernel takes 4,096 positions
        ("gpt2", {"dtype": "float16"}),
        ("gpt-oss-20b", {"mxfp4": "none"}),
        ("gpt-oss-20b", {"mxfp4": "linear"}),
        ("gpt-oss-20b", {"width": 2888}),
        ("gpt-oss-20b", {"num_experts": 24}),
        ("gpt-oss-20b", {"dtype": "float16"}),
        ("gpt-oss-20b", {"implementation": "xla"}),
        ("llama-3.1-8b", {"mxfp4": "linear"}),
        ("llama-3.1-8b", {"types": (("layers/0/mlp/down", ("Q4_K",)),)}),
        ("llama-3.1-8b", {"mlp_width": 14344}),
    ],
    ids=str,
)
def test_others_compute_all_rows_on_hopper(hopper, name, other):
    model = _model(name, **other)
    assert not is_free_of_load(model) and not is_exact_by_default(model)
    policy = default_policy(model, slots=8)
    assert policy.row_sizes == (8,) and policy.chunk_multiple == policy.chunk and not policy.packed


def test_on_a_cpu_float32_is_free_of_load():
    model = _model("gpt2", dtype="float32")
    assert is_exact_by_default(model)
    assert is_free_of_load(model) == same_bits.holds()
    for name in ("gpt2", "gpt-oss-20b"):
        assert not is_free_of_load(_model(name))
