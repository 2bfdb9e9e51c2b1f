"""`lm.activations`: the stages, their shapes, and that they are the forward pass and no second one."""

import numpy as np
import pytest

import gptjax
from gptjax import RequestError
from gptjax.models.stages import stages

IDS = [5, 6, 7, 8, 9]
T, D, N, H, F, V = 5, 256, 4, 64, 1024, 8192
SHAPES = {
    "attention_norm": (T, D),
    "attention/q": (T, N, H),
    "attention/k": (T, N, H),
    "attention/v": (T, N, H),
    "attention/heads": (T, N, H),
    "attention/out": (T, D),
    "attention_residual": (T, D),
    "mlp_norm": (T, D),
    "mlp/up": (T, F),
    "mlp/activation": (T, F),
    "mlp/down": (T, D),
    "mlp_residual": (T, D),
}


@pytest.fixture(scope="module")
def found(lm):
    return lm.activations(IDS)


def test_all_stages_are_there_in_order_with_their_shapes(lm, found):
    assert list(found) == stages(lm.config)
    assert len(found) == 1 + 6 * 12 + 2
    assert found["embedding"].shape == found["final_norm"].shape == (T, D)
    assert found["logits"].shape == (T, V)
    for layer in range(6):
        for stage in SHAPES:
            assert found[f"block_{layer}/{stage}"].shape == SHAPES[stage]


def test_the_stages_fit_together(lm, found):
    """Each from the ones before, in float64 from the weights; attention itself has its own tests."""
    params = {key: np.asarray(value, np.float64) for key, value in _flat(lm.params).items()}
    x = params["token_embedding"][IDS] + params["position_embedding"][:T]
    _close(found["embedding"], x)
    for layer in range(6):
        block = f"block_{layer}"
        at = lambda stage, block=block: found[f"{block}/{stage}"].astype(np.float64)  # noqa: E731
        weight = lambda name, block=block: params[f"{block}/{name}"]  # noqa: E731
        qkv = at("attention_norm") @ weight("attention/qkv/kernel") + weight("attention/qkv/bias")
        for index, name in enumerate("qkv"):
            _close(at(f"attention/{name}").reshape(T, D), qkv[:, index * D : (index + 1) * D])
        out = at("attention/heads").reshape(T, D) @ weight("attention/out/kernel") + weight("attention/out/bias")
        _close(at("attention/out"), out)
        _close(at("attention_residual"), x + at("attention/out"))
        _close(at("mlp/up"), at("mlp_norm") @ weight("mlp/up/kernel") + weight("mlp/up/bias"))
        _close(at("mlp/down"), at("mlp/activation") @ weight("mlp/down/kernel") + weight("mlp/down/bias"))
        x = at("attention_residual") + at("mlp/down")
        _close(at("mlp_residual"), x)
        x = at("mlp_residual")
    _close(found["logits"], found["final_norm"].astype(np.float64) @ params["token_embedding"].T)


def test_the_logits_are_those_of_the_model(lm, found):
    np.testing.assert_allclose(found["logits"], lm.logits(IDS), atol=1e-4)


def test_bad_ids_are_named(lm):
    with pytest.raises(RequestError, match="8192"):
        lm.activations([8192])


def _close(a, b):
    assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def _flat(tree, prefix=""):
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def test_the_stages_of_gpt_oss():
    lm = gptjax.load("gpt-oss-tales", dtype="float32", max_length=64)
    found = lm.activations(IDS)
    assert list(found) == stages(lm.config)
    shapes = {name: found[f"block_5/{name}"].shape for name in ("attention/q", "attention/k", "moe/router", "moe")}
    assert shapes == {"attention/q": (T, 8, 64), "attention/k": (T, 2, 64), "moe/router": (T, 8), "moe": (T, 256)}
    for layer in range(6):
        before, added, after = (
            found[f"block_{layer}/{name}"] for name in ("attention_residual", "moe", "moe_residual")
        )
        np.testing.assert_allclose(before + added, after, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["logits"], lm.logits(IDS), rtol=0, atol=1e-4)
