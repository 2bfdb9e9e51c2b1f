"""Which models' requests have the same bits in any company, by device and kind."""

import dataclasses

import jax.numpy as jnp
import pytest

from gptjax.config import PUBLISHED
from gptjax.engine.free_of_load import is_exact_by_default, is_free_of_load, least_call
from gptjax.engine.pools import default_policy
from gptjax.models import registry
from pallas_kernels import dispatch, same_bits
from pallas_kernels.matvec import FEW


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(dispatch, "preferred", lambda: dispatch.MOSAIC)
    monkeypatch.setattr(dispatch, "_MOSAIC_SINCE", (0, 0))


def _model(name: str, *, dtype: str = "bfloat16", implementation: str = "auto", **changes: object):
    config = dataclasses.replace(PUBLISHED[name], **changes)
    return registry.build(config, dtype=jnp.dtype(dtype), implementation=implementation)


@pytest.mark.parametrize("name", ["gpt-oss-20b", "gpt-oss-120b", "llama-3.1-8b", "qwen2.5-7b", "qwen3-0.6b"])
def test_models_with_a_kernel_for_each_sum_are_on_hopper(hopper, name):
    model = _model(name)
    assert is_free_of_load(model) and is_exact_by_default(model)
    assert least_call(model) > FEW  # such calls never take a kernel for few rows
    policy = default_policy(model, slots=128)
    assert policy.row_sizes[:3] == (1, 2, 4) and policy.packed and not policy.share_decoded
    assert policy.call_sizes[0] == least_call(model)
    assert default_policy(model, slots=128, exact=False).call_sizes[0] == 32


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("gpt2", {}),  # a block is one kernel up to eight rows
        ("gpt-oss-20b", {"mxfp4": "none"}),
        ("gpt-oss-20b", {"mxfp4": "linear"}),
        ("gpt-oss-20b", {"width": 2888}),
        ("gpt-oss-20b", {"dtype": "float16"}),
        ("gpt-oss-20b", {"implementation": "xla"}),
        ("llama-3.1-8b", {"mxfp4": "linear"}),
        ("llama-3.1-8b", {"types": (("layers/0/mlp/down", ("Q4_K",)),)}),
        ("llama-3.1-8b", {"mlp_width": 14344}),
        ("gpt-oss-20b", {"num_experts": 24}),
    ],
    ids=str,
)
def test_others_are_not_on_hopper(hopper, name, other):
    model = _model(name, **other)
    assert not is_free_of_load(model) and not is_exact_by_default(model)
    assert default_policy(model, slots=8).row_sizes == (8,)


def test_on_a_cpu_float32_is():
    assert is_free_of_load(_model("gpt2", dtype="float32")) == same_bits.holds()
    assert not is_free_of_load(_model("gpt2")) and not is_free_of_load(_model("gpt-oss-20b"))
