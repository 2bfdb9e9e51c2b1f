"""Llama's steps as they are compiled for a Hopper GPU: which kernels they take; nothing runs."""

import jax
import jax.numpy as jnp
import pytest

from gptjax.config import PUBLISHED
from gptjax.models import registry
from gptjax.models.params import abstract_params
from pallas_kernels import dispatch
from tests.pallas_kernels.marks import lowered_for_h200, needs_mosaic
from tests.thinned import thorough


def _kernels(name: str, rows: int, tokens: int) -> int:
    """How many kernels of ours the first layer of a published size takes in a call of `rows` x `tokens`."""
    model = registry.build(PUBLISHED[name].with_one_layer(), dtype=jnp.bfloat16)
    ids_BT = jax.ShapeDtypeStruct((rows, tokens), jnp.int32)
    cache = jax.eval_shape(lambda: registry.create_cache(model, batch=rows, max_length=2048))

    def step(params, ids_BT, positions_BT, cache):
        return model.apply({"params": params}, ids_BT, positions_BT, cache)

    return lowered_for_h200(step, abstract_params(model), ids_BT, ids_BT, cache).count("custom_call")


@needs_mosaic
@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-7b", thorough("smollm2-135m"), thorough("mistral-7b")])
def test_decoding_takes_every_kernel(name, monkeypatch):
    """Three norms, four products, attention, and the step from product to cache."""
    monkeypatch.setattr(dispatch, "preferred", lambda: dispatch.MOSAIC)
    assert _kernels(name, rows=8, tokens=1) == 3 + 4 + 1 + 1
    assert _kernels(name, rows=1, tokens=512) == 1  # attention; XLA has the rest


@needs_mosaic
def test_norms_of_heads_are_between_product_and_cache(monkeypatch):
    """So the kernel that goes from one to the other is not taken."""
    monkeypatch.setattr(dispatch, "preferred", lambda: dispatch.MOSAIC)
    assert _kernels("qwen3-0.6b", rows=1, tokens=1) == 3 + 4 + 1
