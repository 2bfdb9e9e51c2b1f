"""gpt-oss-tales, a trained GPT-OSS, against what transformers computed for it in float32 (`tests/data/golden`).

The oracle is recorded: ids, residual stream, logits and 48 greedy tokens of three prompts, the third of 563 tokens,
which is more than four windows and so four times around every ring. Experts stay packed in MXFP4, exact in float32.
Weights are put in place by the tests' own mapping, and by `convert` in `test_generate` alone. The float64 oracle is
held to the same recording.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import gptjax
from gptjax.config import read_config
from gptjax.layers.cache import KVCache
from gptjax.models import registry
from gptjax.models.params import Params
from gptjax.models.registry import Model
from tests.oracles import gpt2_ours, gpt_oss_numpy, gpt_oss_ours
from tests.oracles.gpt2_ours import Outputs
from tests.thinned import thinned, thorough

DEMO = Path(gptjax.__file__).parent / "demo" / "gpt-oss-tales"
GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "gpt-oss-tales.npz"
PROMPTS = range(3)
LONG, STEPS, CAPACITY = 2, 48, 640
# Of the largest magnitude of each hidden state, and absolute. Two float32 programs differ in the order of sums of 192
# to 512 terms and of 563 in the softmax, and in how an angle of some hundred radians is rounded, over six blocks.
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
    """The checkpoint's bfloat16 tensors as float32, and the packed ones as they are."""
    assert np.dtype(ml_dtypes.bfloat16).itemsize == 2  # importing ml_dtypes teaches NumPy, and so safetensors, bfloat16
    loaded: dict[str, np.ndarray] = {}
    for file in sorted(DEMO.glob("*.safetensors")):
        loaded |= safetensors.numpy.load_file(file)
    assert len(loaded) == 6 * 19 + 3
    return {name: value if value.dtype == np.uint8 else value.astype(np.float32) for name, value in loaded.items()}


@pytest.fixture(scope="module")
def ours(tensors) -> tuple[Model, Params]:
    return registry.build(read_config(DEMO)), gpt_oss_ours.params(tensors)


def _deviations(golden: Golden, blocks_LTD: Any, logits_TV: Any) -> tuple[float, float]:
    """The largest of all hidden states and of the logits, as parts of what is allowed."""
    recorded = len(golden.logits_TV)
    hidden = [
        np.abs(np.asarray(actual[-recorded:]) - expected).max() / (HIDDEN_TOLERANCE * np.abs(expected).max())
        for actual, expected in zip(blocks_LTD, golden.hidden_LTD[1:], strict=True)
    ]
    return max(hidden), np.abs(np.asarray(logits_TV[-recorded:]) - golden.logits_TV).max() / LOGITS_TOLERANCE


def _assert_golden(golden: Golden, blocks_LTD: Any, logits_TV: Any) -> None:
    """Compares outputs for the whole prompt with the recording of its last positions."""
    hidden, logits = _deviations(golden, blocks_LTD, logits_TV)
    assert hidden <= 1
    assert logits <= 1


def _whole(golden: Golden, model: Model, params: Params) -> Outputs:
    """A prompt and its recorded continuation at once, without a cache, padded."""
    sequence = [*golden.ids_T.tolist(), *golden.greedy[:-1]]
    tokens, positions = gpt2_ours.pack([sequence], CAPACITY)
    return gpt_oss_ours.row(gpt_oss_ours.run(model, params, tokens, positions)[0], 0, positions)


def _prefill(
    prompts: dict[int, Golden], model: Model, params: Params, chunk: int, layout: str
) -> tuple[dict[int, Outputs], KVCache]:
    """Prompts, by slot of four, in chunks of so many tokens over a cache that held NaN.

    Where a prompt has ended, and in the other slots, there is padding: so is the last chunk filled up.
    """
    cache = gpt_oss_ours.filled(registry.create_cache(model, batch=4, max_length=CAPACITY), np.nan)
    ids = [prompts[b].ids_T.tolist() if b in prompts else [] for b in range(4)]
    outputs: dict[int, list[Outputs]] = {b: [] for b in prompts}
    for start in range(0, max(map(len, ids)), chunk):
        parts = [row[start : start + chunk] for row in ids]
        tokens, positions = gpt2_ours.pack(parts, chunk, starts=[start] * 4, layout=layout)
        one, cache = gpt_oss_ours.run(model, params, tokens, positions, cache)
        for b, chunks in outputs.items():
            chunks.append(gpt_oss_ours.row(one, b, positions))
    assert cache.lengths_B.tolist() == [len(row) for row in ids]
    return {b: gpt_oss_ours.join(chunks) for b, chunks in outputs.items()}, cache


def _decode(
    model: Model, params: Params, prefilled: dict[int, Outputs], cache: KVCache, count: int = STEPS
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens [B, count] after the prompts, and the final hidden states of all steps but the last [B, …, D]."""
    first_B = np.zeros(4, np.int32)
    for b, outputs in prefilled.items():
        first_B[b] = outputs.logits_BTV[-1].argmax()
    tokens, hidden = [first_B], []
    for _ in range(count - 1):
        positions_B1 = cache.lengths_B[:, None]
        outputs, cache = gpt_oss_ours.run(model, params, tokens[-1][:, None], positions_B1, cache)
        tokens.append(np.asarray(outputs.logits_BTV[:, 0].argmax(axis=-1), np.int32))
        hidden.append(np.asarray(outputs.final_BTD[:, 0]))
    return np.stack(tokens, axis=1), np.stack(hidden, axis=1)


def test_recording_is_what_it_says(golden):
    prompts = json.loads((GOLDEN.parent / "prompts.json").read_text(encoding="utf-8"))["gpt-oss-tales"]
    tokenizer = gptjax.load_tokenizer(DEMO)
    assert [len(one.ids_T) for one in golden] == [10, 38, 563]
    for one, prompt in zip(golden, prompts, strict=True):
        if "<|" not in prompt:
            assert tokenizer.encode(prompt) == one.ids_T.tolist()
        assert one.hidden_LTD.shape[:2] == (7, len(one.logits_TV))
        assert len(one.greedy) == STEPS
        assert one.logits_TV[-1].argmax() == one.greedy[0]


@pytest.mark.parametrize("prompt", thinned(PROMPTS, 0))
def test_oracle(golden, tensors, prompt):
    """Which decodes MXFP4 by itself; a fiftieth of what is allowed is seen."""
    config = json.loads((DEMO / "config.json").read_text())
    one = golden[prompt]
    outputs = gpt_oss_numpy.forward(gpt_oss_numpy.dequantized(tensors), config, one.ids_T)
    np.testing.assert_array_equal(outputs.embedding_TD[-len(one.logits_TV) :], one.hidden_LTD[0])
    _assert_golden(one, outputs.blocks_LTD, outputs.logits_TV)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_full_forward(golden, ours, prompt):
    """Every hidden state and logit, and the most likely token after each of the recorded ones."""
    one, outputs = golden[prompt], _whole(golden[prompt], *ours)
    length = len(one.ids_T)
    _assert_golden(one, outputs.blocks_LBTD[:, :length], outputs.logits_BTV[:length])
    assert outputs.logits_BTV[length - 1 :].argmax(axis=-1).tolist() == one.greedy


@pytest.mark.parametrize(("chunk", "layout"), [thorough(64, "left"), thorough(100, "right")])
def test_chunked_prefill_and_decoding_together(golden, ours, chunk, layout):
    """All prompts in one padded batch, in chunks that divide the window and chunks that do not; then a token a step.

    With one of the two, the long prompt alone as well: it has the same bits.
    """
    prefilled, cache = _prefill(dict(enumerate(golden)), *ours, chunk, layout)
    for b, outputs in prefilled.items():
        _assert_golden(golden[b], outputs.blocks_LBTD, outputs.logits_BTV)
    tokens, hidden = _decode(*ours, prefilled, cache)
    assert tokens[:3].tolist() == [one.greedy for one in golden]

    if chunk == 64:
        alone, cache = _prefill({LONG: golden[LONG]}, *ours, chunk, layout)
        for bits, together in zip(alone[LONG], prefilled[LONG], strict=True):
            np.testing.assert_array_equal(bits, together)
        _, alone_hidden = _decode(*ours, alone, cache, count=9)
        np.testing.assert_array_equal(alone_hidden[LONG], hidden[LONG, :8])


@pytest.mark.parametrize("prompt", thinned([0, LONG]))
def test_generate(golden, prompt):
    """From the demo's name to the recorded tokens."""
    lm = gptjax.load("gpt-oss-tales", dtype="float32", max_length=CAPACITY)
    completion = lm.generate(golden[prompt].ids_T.tolist(), max_tokens=STEPS, temperature=0)
    assert list(completion.token_ids) == golden[prompt].greedy


def _mutated(ours: tuple[Model, Params], mutation: str) -> tuple[Model, Params]:
    model, params = ours
    if mutation == "window 129":
        windows = gpt_oss_ours.wider_windows(model.config)
        assert windows == (129, None) * 3
        return registry.build(dataclasses.replace(model.config, windows=windows)), params
    return model, gpt_oss_ours.without_sinks(params)


@pytest.mark.parametrize("mutation", thinned(["window 129", "no sinks"], "no sinks"))
def test_the_recording_catches(golden, ours, mutation):
    """The two mistakes that ports make. In chunks over a cache: `tests/models/test_gpt_oss.py`."""
    one, outputs = golden[LONG], _whole(golden[LONG], *_mutated(ours, mutation))
    length = len(one.ids_T)
    hidden, logits = _deviations(one, outputs.blocks_LBTD[:, :length], outputs.logits_BTV[:length])
    assert hidden > 10
    assert logits > 10


@pytest.mark.thorough
def test_the_short_prompts_cannot_catch_a_wrong_window(golden, ours):
    """Why the long prompt is there: below the window's length the mistake changes no bit."""
    short, mutated = golden[0], _mutated(ours, "window 129")
    for actual, expected in zip(_whole(short, *mutated), _whole(short, *ours), strict=True):
        np.testing.assert_array_equal(actual, expected)
