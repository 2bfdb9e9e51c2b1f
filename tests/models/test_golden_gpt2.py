"""gpt2-tales, a trained GPT-2, against what transformers computed for it in float32 (`tests/data/golden`).

The oracle is recorded: ids, residual stream, logits and 48 greedy tokens of three prompts, the third of 359 tokens.
Weights are read from the demo's safetensors and put in place by the tests' own mapping, not by `convert`. The float64
oracle is held to the same recording.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import gptjax
from gptjax.config import read_config
from gptjax.layers.cache import KVCache
from gptjax.models import registry
from gptjax.models.gpt2 import GPT2
from tests.oracles import gpt2_numpy, gpt2_ours
from tests.thinned import thinned

DEMO = Path(gptjax.__file__).parent / "demo" / "gpt2-tales"
GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "gpt2-tales.npz"
PROMPTS = range(3)
# Of the largest magnitude of each hidden state, and absolute. Two float32 programs differ in the order of sums of 256
# to 1024 terms and of 359 in the softmax, over six blocks; a fiftieth of what is allowed is seen.
HIDDEN_TOLERANCE, LOGITS_TOLERANCE = 2e-4, 1e-3


class Golden(NamedTuple):
    """The recording for a prompt; hidden states and logits are of its last 8 tokens if it is a long one."""

    ids_T: np.ndarray
    hidden_LTD: np.ndarray  # the embedding, then the residual stream after each block, before the final norm
    logits_TV: np.ndarray
    greedy: list[int]


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def golden() -> list[Golden]:
    with np.load(GOLDEN) as recorded:
        return [
            Golden(*(recorded[f"{part}_{n}"] for part in ("ids", "hidden", "logits")), recorded[f"greedy_{n}"].tolist())
            for n in PROMPTS
        ]


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    """The checkpoint's bfloat16 tensors as float32, without the prefix of transformers."""
    assert np.dtype(ml_dtypes.bfloat16).itemsize == 2  # importing ml_dtypes teaches NumPy, and so safetensors, bfloat16
    loaded = safetensors.numpy.load_file(DEMO / "model.safetensors")
    assert len(loaded) == 6 * 12 + 4
    return {name.removeprefix("transformer."): value.astype(np.float32) for name, value in loaded.items()}


@pytest.fixture(scope="module")
def model() -> GPT2:
    return registry.build(read_config(DEMO))


@pytest.fixture(scope="module")
def params(tensors) -> dict[str, Any]:
    return gpt2_ours.params(tensors)


def _assert_golden(golden: Golden, blocks_LTD: Any, logits_TV: Any) -> None:
    """Compares outputs for the whole prompt with the recording of its last positions."""
    recorded = len(golden.logits_TV)
    for n, (actual, expected) in enumerate(zip(blocks_LTD, golden.hidden_LTD[1:], strict=True)):
        atol = HIDDEN_TOLERANCE * np.abs(expected).max()
        np.testing.assert_allclose(actual[-recorded:], expected, rtol=0, atol=atol, err_msg=f"block {n}")
    np.testing.assert_allclose(logits_TV[-recorded:], golden.logits_TV, rtol=0, atol=LOGITS_TOLERANCE)


def test_recording_is_what_it_says(golden):
    prompts = json.loads((GOLDEN.parent / "prompts.json").read_text(encoding="utf-8"))["gpt2-tales"]
    assert len(prompts) == len(golden)
    assert [len(one.ids_T) for one in golden] == [10, 10, 359]
    for one in golden:
        assert one.hidden_LTD.shape[:2] == (7, len(one.logits_TV))
        assert len(one.greedy) == 48
        assert one.logits_TV[-1].argmax() == one.greedy[0]


@pytest.mark.parametrize("prompt", [0, 1])
def test_oracle(golden, tensors, prompt):
    outputs = gpt2_numpy.forward(tensors, json.loads((DEMO / "config.json").read_text()), golden[prompt].ids_T)
    recorded = golden[prompt].hidden_LTD[0]
    np.testing.assert_allclose(outputs.embedding_TD, recorded, rtol=0, atol=HIDDEN_TOLERANCE * np.abs(recorded).max())
    _assert_golden(golden[prompt], outputs.blocks_LTD, outputs.logits_TV)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_full_forward(golden, model, params, prompt):
    """Every hidden state and logit, and the most likely token after each of the recorded ones."""
    one = golden[prompt]
    sequence, length = [*one.ids_T.tolist(), *one.greedy[:-1]], len(one.ids_T)
    outputs, _ = gpt2_ours.run(model, params, *gpt2_ours.pack([sequence], 448))
    _assert_golden(one, outputs.blocks_LBTD[:, 0, :length], outputs.logits_BTV[0, :length])
    assert outputs.logits_BTV[0, length - 1 : len(sequence)].argmax(axis=-1).tolist() == one.greedy


def _decode(model: GPT2, params: dict[str, Any], first_B: np.ndarray, cache: KVCache) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens [B, 48] that begin with `first_B`, and the final hidden states of all steps [B, 47, D]."""
    tokens, hidden = [first_B], []
    for _ in range(47):
        positions_B1 = cache.lengths_B[:, None]
        outputs, cache = gpt2_ours.run(model, params, tokens[-1][:, None], positions_B1, cache)
        tokens.append(np.asarray(outputs.logits_BTV[:, 0].argmax(axis=-1), np.int32))
        hidden.append(np.asarray(outputs.final_BTD[:, 0]))
    return np.stack(tokens, axis=1), np.stack(hidden, axis=1)


@pytest.mark.parametrize("prompt", thinned(PROMPTS))
def test_cached_alone(golden, model, params, prompt):
    """Prefill in a batch of one, then decoding a token a step."""
    ids = golden[prompt].ids_T
    tokens, positions = gpt2_ours.pack([ids], -(-len(ids) // 64) * 64)
    outputs, cache = gpt2_ours.run(
        model, params, tokens, positions, registry.create_cache(model, batch=1, max_length=512)
    )
    real = slice(len(ids))
    _assert_golden(golden[prompt], outputs.blocks_LBTD[:, 0, real], outputs.logits_BTV[0, real])
    first_B = np.asarray(outputs.logits_BTV[:, len(ids) - 1].argmax(axis=-1), np.int32)
    assert _decode(model, params, first_B, cache)[0][0].tolist() == golden[prompt].greedy


@pytest.mark.parametrize("layout", thinned(["left", "right"]))
def test_cached_together(golden, model, params, layout):
    """All prompts in one padded batch and an unused slot, in a cache that held NaN; a row's bits are as alone."""
    empty = registry.create_cache(model, batch=4, max_length=512)
    empty = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x, empty)
    rows = [one.ids_T.tolist() for one in golden]

    def run(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        tokens, positions = gpt2_ours.pack(rows, 384, layout=layout)
        outputs, cache = gpt2_ours.run(model, params, tokens, positions, empty)
        first_B = np.zeros(4, np.int32)
        for b, row in enumerate(rows):
            if row:
                real = positions[b] >= 0
                logits_TV = outputs.logits_BTV[b, real]
                _assert_golden(golden[b], outputs.blocks_LBTD[:, b, real], logits_TV)
                first_B[b] = logits_TV[-1].argmax()
        return _decode(model, params, first_B, cache)

    tokens, hidden = run([*rows, []])
    assert tokens[:3].tolist() == [one.greedy for one in golden]
    alone_tokens, alone_hidden = run([[], rows[1], [], []])
    np.testing.assert_array_equal(alone_tokens[1], tokens[1])
    np.testing.assert_array_equal(alone_hidden[1], hidden[1])
