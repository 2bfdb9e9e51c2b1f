"""Our GPT-2 and the float64 oracle against transformers, live, on checkpoints that transformers writes itself.

Weights are those of `tests/oracles/gpt2_random.py`, put into a `GPT2LMHeadModel` (eager attention, float32), saved with
`save_pretrained` and read back from its `config.json` and safetensors, by the tests' own mapping and not by `convert`.
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

from gptjax.config import read_config
from gptjax.models import registry
from gptjax.models.gpt2 import GPT2
from tests.oracles import gpt2_numpy, gpt2_ours, gpt2_random

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

# Both compute in float32; see `tests/models/test_gpt2.py` for what adds up. Of the largest magnitude.
TOLERANCE = 128 * float(jnp.finfo(jnp.float32).eps)

VARIANTS = {
    **gpt2_random.VARIANTS,
    "one_head": {"n_head": 1},
    "four_layers_of_narrow_heads": {"n_head": 12, "n_layer": 4},
    "all_at_once": {
        "activation_function": "gelu",
        "n_inner": None,
        "scale_attn_by_inverse_layer_idx": True,
        "tie_word_embeddings": False,
        "layer_norm_epsilon": 1e-3,
        "n_embd": 84,
        "n_head": 7,
    },
}


class Case(NamedTuple):
    """A checkpoint on disk, by transformers and by us."""

    theirs: Any  # GPT2LMHeadModel
    raw: dict[str, Any]  # its config.json
    tensors: dict[str, np.ndarray]  # without the prefix
    model: GPT2
    params: dict[str, Any]


@pytest.fixture(autouse=True)
def _highest_precision():
    torch.set_num_threads(1)
    with jax.default_matmul_precision("highest"):
        yield


def _case(directory: Path, changes: dict[str, Any], dtype: Any = torch.float32) -> Case:
    config, tensors = gpt2_random.checkpoint(**changes)
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config, **special, attn_implementation="eager"))
    state = {
        name if name == "lm_head.weight" else f"transformer.{name}": torch.from_numpy(value)
        for name, value in tensors.items()
    }
    state.setdefault("lm_head.weight", state["transformer.wte.weight"])
    theirs.load_state_dict(state, strict=True)
    theirs.to(dtype).eval().save_pretrained(directory)
    loaded = safetensors.numpy.load_file(directory / "model.safetensors")
    loaded = {name.removeprefix("transformer."): value for name, value in loaded.items()}
    assert loaded.keys() == tensors.keys()
    model = registry.build(read_config(directory))
    return Case(theirs, json.loads((directory / "config.json").read_text()), loaded, model, gpt2_ours.params(loaded))


def _run_theirs(model: Any, ids: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The residual stream after each block [L, B, T, D] and logits [B, T, V], float64."""
    blocks: list[Any] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: blocks.append(out[0] if isinstance(out, tuple) else out))
        for block in model.transformer.h
    ]
    with torch.no_grad():
        logits = model(torch.as_tensor(ids), use_cache=False, **options).logits
    for hook in hooks:
        hook.remove()
    return torch.stack(blocks).double().numpy(), logits.double().numpy()


def _assert_close(actual: Any, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=0, atol=atol)


def _rms(actual: Any, expected: np.ndarray) -> float:
    return float(np.sqrt(np.square(np.asarray(actual, np.float64) - expected).mean()))


def _greedy(case: Case, rows: list[list[int]], count: int) -> list[list[int]]:
    """Our greedy continuation of rows of different lengths, in one batch with a cache."""
    cache = registry.create_cache(case.model, batch=len(rows), max_length=case.model.config.context_length)
    tokens, positions = gpt2_ours.pack(rows, max(map(len, rows)), layout="left")
    continuations: list[list[int]] = [[] for _ in rows]
    for _ in range(count):
        outputs, cache = gpt2_ours.run(case.model, case.params, tokens, positions, cache)
        tokens = np.asarray(outputs.logits_BTV[:, -1:].argmax(axis=-1), np.int32)
        positions = cache.lengths_B[:, None]
        for continuation, token in zip(continuations, tokens[:, 0].tolist(), strict=True):
            continuation.append(token)
    return continuations


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_whole_sequences_and_greedy_generation(tmp_path, changes):
    case = _case(tmp_path, changes)
    ids = np.array([gpt2_random.tokens(seed, 17) for seed in (1, 2)])
    blocks_LBTD, logits_BTV = _run_theirs(case.theirs, ids)
    outputs, _ = gpt2_ours.run(case.model, case.params, *gpt2_ours.pack(ids.tolist(), 17))
    for actual, expected in zip(outputs.blocks_LBTD, blocks_LBTD, strict=True):
        _assert_close(actual, expected)
    _assert_close(outputs.logits_BTV, logits_BTV)

    generated = case.theirs.generate(
        torch.as_tensor(ids), attention_mask=torch.ones(2, 17, dtype=torch.long), do_sample=False, max_new_tokens=20
    )
    assert _greedy(case, ids.tolist(), 20) == generated[:, 17:].tolist()


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_float64_oracle(tmp_path, changes):
    case = _case(tmp_path, changes)
    ids = gpt2_random.tokens(3, 37)
    blocks_LBTD, logits_BTV = _run_theirs(case.theirs.double(), [ids])
    oracle = gpt2_numpy.forward(case.tensors, case.raw, ids)
    for actual, expected in zip(oracle.blocks_LTD, blocks_LBTD[:, 0], strict=True):
        _assert_close(actual, expected, 1e-12)
    _assert_close(oracle.logits_TV, logits_BTV[0], 1e-12)


def test_padded_batches(tmp_path):
    """Left padding with a mask and explicit positions, as transformers wants them; and its own generation of them."""
    case = _case(tmp_path, {})
    rows = [gpt2_random.tokens(seed, length) for seed, length in ((4, 17), (5, 1), (6, 9))]
    tokens, positions = gpt2_ours.pack(rows, 17, layout="left")
    real = positions >= 0
    ids, mask = torch.as_tensor(np.where(real, tokens, 0)).long(), torch.as_tensor(real).long()
    options = {"attention_mask": mask, "position_ids": torch.as_tensor(np.maximum(positions, 0)).long()}
    blocks_LBTD, logits_BTV = _run_theirs(case.theirs, ids, **options)
    outputs, _ = gpt2_ours.run(case.model, case.params, tokens, positions)
    for actual, expected in zip(outputs.blocks_LBTD, blocks_LBTD, strict=True):
        _assert_close(actual[real], expected[real])
    _assert_close(outputs.logits_BTV[real], logits_BTV[real])

    generated = case.theirs.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=20)
    assert _greedy(case, rows, 20) == generated[:, 17:].tolist()


def test_a_checkpoint_in_bfloat16(tmp_path):
    """The same weights computed with in float32 agree; in bfloat16 we are no further from the truth than they are."""
    case = _case(tmp_path, {}, torch.bfloat16)
    assert {value.dtype for value in case.tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    ids = gpt2_random.tokens(7, 29)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    blocks_LBTD, logits_BTV = _run_theirs(theirs.eval(), [ids])
    outputs, _ = gpt2_ours.run(case.model, case.params, *gpt2_ours.pack([ids], 29))
    for actual, expected in zip(outputs.blocks_LBTD, blocks_LBTD, strict=True):
        _assert_close(actual, expected)
    _assert_close(outputs.logits_BTV, logits_BTV)

    truth = gpt2_numpy.forward(case.tensors, case.raw, ids)
    blocks_LBTD, logits_BTV = _run_theirs(case.theirs, [ids])
    model, params = registry.build(case.model.config, dtype=jnp.bfloat16), gpt2_ours.params(case.tensors, jnp.bfloat16)
    outputs, _ = gpt2_ours.run(model, params, *gpt2_ours.pack([ids], 29))
    for ours, other, true in zip(outputs.blocks_LBTD, blocks_LBTD, truth.blocks_LTD, strict=True):
        assert _rms(ours[0], true) < 1.1 * _rms(other[0], true)
    assert _rms(outputs.logits_BTV[0], truth.logits_TV) < 1.1 * _rms(logits_BTV[0], truth.logits_TV)
