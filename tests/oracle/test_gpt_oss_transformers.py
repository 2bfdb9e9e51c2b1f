"""Our GPT-OSS and the float64 oracle against transformers, live, on checkpoints that transformers writes itself.

Weights are those of `tests/oracles/gpt_oss_random.py`, put into a `GptOssForCausalLM` (eager attention and experts),
saved with `save_pretrained` and read back from its `config.json` and safetensors: experts dequantised, rotary settings
as `rope_parameters`, loaded by `convert`.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import PUBLISHED, GptOssConfig, config_from_json
from gptjax.errors import ConfigError
from gptjax.layers.rope import inv_freq, rotation
from gptjax.models import registry
from gptjax.models.params import Params
from gptjax.models.registry import Model
from tests.oracles import gpt2_ours, gpt_oss_numpy, gpt_oss_ours, gpt_oss_random
from tests.oracles.gpt2_ours import Outputs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

EPSILON = float(jnp.finfo(jnp.float32).eps)
# Both compute in float32; see `tests/models/test_gpt_oss.py` for what adds up. Of the largest magnitude.
TOLERANCE = 128 * EPSILON
LENGTH = 150
PUBLISHED_WINDOW = {**gpt_oss_random.TWO_LAYERS, "sliding_window": 128}
VARIANTS = {
    **gpt_oss_random.VARIANTS,
    "published_window": PUBLISHED_WINDOW,
    "one_key_value_head": {"num_key_value_heads": 1},
    "every_head_its_own": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 20},
    "every_expert": {"num_experts_per_tok": 6},
    "all_at_once": {
        **gpt_oss_random.VARIANTS["truncated"],
        "attention_bias": False,
        "tie_word_embeddings": True,
        "swiglu_limit": 1.5,
        "swiglu_alpha": 1.2,
        "rms_norm_eps": 1e-3,
        "num_local_experts": 11,
        "hidden_size": 160,
    },
}
# 3 heads of 32 in two layers: small enough for 4,300 positions at once.
LONG: dict[str, Any] = {
    **PUBLISHED_WINDOW,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
LONG_LENGTH = 4300  # more than YaRN's original 4096


class Case(NamedTuple):
    """A checkpoint on disk, by transformers and by us."""

    theirs: Any  # GptOssForCausalLM
    checkpoint: gpt_oss_random.Checkpoint
    model: Model
    params: Params

    def oracle(self, ids: Sequence[int]) -> gpt_oss_numpy.Outputs:
        return gpt_oss_numpy.forward(self.checkpoint.dense, self.checkpoint.config, ids)


@pytest.fixture(autouse=True)
def _highest_precision():
    torch.set_num_threads(1)
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Case:
    return _case(tmp_path_factory.mktemp("tiny"), {})


def _theirs(checkpoint: gpt_oss_random.Checkpoint, dtype: Any = torch.float32) -> Any:
    settings = {"attn_implementation": "eager", "experts_implementation": "eager"}
    theirs = transformers.GptOssForCausalLM(transformers.GptOssConfig(**checkpoint.config, **settings)).to(dtype)
    state = {name: torch.from_numpy(np.asarray(value, np.float64)) for name, value in checkpoint.dense.items()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()


def _case(directory: Path, changes: dict[str, Any]) -> Case:
    checkpoint = gpt_oss_random.checkpoint(**changes)
    theirs = _theirs(checkpoint)
    theirs.save_pretrained(directory)
    written = json.loads((directory / "config.json").read_text())
    assert "rope_parameters" in written
    assert "rope_scaling" not in written
    return Case(theirs, checkpoint, *gpt_oss_ours.load(directory))


def _run_theirs(model: Any, ids: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """The residual stream after each block [L, B, T, D] and logits [B, T, V], float64."""
    blocks: list[Any] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: blocks.append(out[0] if isinstance(out, tuple) else out))
        for block in model.model.layers
    ]
    with torch.no_grad():
        logits = model(torch.as_tensor(ids), use_cache=False, **options).logits
    for hook in hooks:
        hook.remove()
    return torch.stack(blocks).double().numpy(), logits.double().numpy()


class _Torch:
    """The module `torch` to code that is to know no float32."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def _without_float32() -> Iterator[None]:
    """Makes transformers' own roundings to float32, in norms and rotary embedding, roundings to float64."""
    with (
        mock.patch.object(transformers.models.gpt_oss.modeling_gpt_oss, "torch", _Torch()),
        mock.patch.object(transformers.modeling_rope_utils, "torch", _Torch()),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def _deviation(actual: Any, expected: np.ndarray) -> float:
    """Of the largest magnitude."""
    assert actual.shape == expected.shape
    return float(np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max())


def _deviations(ours: Outputs, blocks_LTD: np.ndarray, logits_TV: np.ndarray) -> float:
    """The largest of all blocks and the logits."""
    pairs = [*zip(ours.blocks_LBTD, blocks_LTD, strict=True), (ours.logits_BTV, logits_TV)]
    return max(_deviation(actual, expected) for actual, expected in pairs)


def _rms(actual: Any, expected: np.ndarray) -> float:
    return float(np.sqrt(np.square(np.asarray(actual, np.float64) - expected).mean()))


def _run_whole(model: Model, params: Params, ids: Sequence[int]) -> Outputs:
    tokens, positions = gpt2_ours.pack([ids], len(ids))
    return gpt_oss_ours.row(gpt_oss_ours.run(model, params, tokens, positions)[0], 0, positions)


def _run_chunks(model: Model, params: Params, ids: Sequence[int], counts: Sequence[int], bucket: int) -> Outputs:
    """With a cache: chunks of more than one token are padded to `bucket`."""
    cache = registry.create_cache(model, batch=1, max_length=len(ids))
    outputs, start = [], 0
    for count in counts:
        part = ids[start : start + count]
        tokens, positions = gpt2_ours.pack([part], bucket if count > 1 else 1, starts=[start])
        one, cache = gpt_oss_ours.run(model, params, tokens, positions, cache)
        outputs.append(gpt_oss_ours.row(one, 0, positions))
        start += count
    return gpt_oss_ours.join(outputs)


def _greedy(case: Case, rows: list[list[int]], count: int) -> list[list[int]]:
    """Our greedy continuation of rows of different lengths, in one batch with a cache."""
    cache = registry.create_cache(case.model, batch=len(rows), max_length=128)
    tokens, positions = gpt2_ours.pack(rows, max(map(len, rows)), layout="left")
    continuations: list[list[int]] = [[] for _ in rows]
    for _ in range(count):
        outputs, cache = gpt_oss_ours.run(case.model, case.params, tokens, positions, cache)
        tokens = np.asarray(outputs.logits_BTV[:, -1:].argmax(axis=-1), np.int32)
        positions = cache.lengths_B[:, None]
        for continuation, token in zip(continuations, tokens[:, 0].tolist(), strict=True):
            continuation.append(token)
    return continuations


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_float64_oracle(changes):
    """To 1e-12: about 5e-15 is seen."""
    checkpoint, ids = gpt_oss_random.checkpoint(**changes), gpt_oss_random.tokens(1, LENGTH)
    with _without_float32():
        blocks_LBTD, logits_BTV = _run_theirs(_theirs(checkpoint, torch.float64), [ids])
    oracle = gpt_oss_numpy.forward(checkpoint.dense, checkpoint.config, ids)
    assert oracle.margin > 1e-5
    for actual, expected in zip(oracle.blocks_LTD, blocks_LBTD[:, 0], strict=True):
        assert _deviation(actual, expected) < 1e-12
    assert _deviation(oracle.logits_TV, logits_BTV[0]) < 1e-12


def test_the_float64_decoder_of_mxfp4():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = gpt_oss_random.checkpoint().packed
    for part in ("gate_up_proj", "down_proj"):
        blocks, scales = (tensors[f"model.layers.1.mlp.experts.{part}_{kind}"] for kind in ("blocks", "scales"))
        theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
        np.testing.assert_array_equal(gpt_oss_numpy.dequantize(blocks, scales).swapaxes(1, 2), theirs.numpy())


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_whole_sequences(tmp_path, changes):
    """Of 150 tokens: more than one published window, more than sixteen of the small ones."""
    case, ids = _case(tmp_path, changes), gpt_oss_random.tokens(1, LENGTH)
    assert case.oracle(ids).margin > 1e-4, "a tie between experts, which rounding may decide: take another seed"
    blocks_LBTD, logits_BTV = _run_theirs(case.theirs, [ids])
    outputs = _run_whole(case.model, case.params, ids)
    assert _deviations(outputs, blocks_LBTD[:, 0], logits_BTV[0]) < TOLERANCE


@pytest.mark.parametrize(
    ("changes", "counts"),
    [({}, [5, *[1] * 45]), ({}, [20, 17, *[1] * 13]), (PUBLISHED_WINDOW, [100, 24, *[1] * 26])],
    ids=["into the window", "past the window", "published window"],
)
def test_decoding_across_the_windows_edge(tmp_path, changes, counts):
    """A cached prefill, then a token a step, against their full forward pass."""
    case, ids = _case(tmp_path, changes), gpt_oss_random.tokens(1, sum(counts))
    assert case.oracle(ids).margin > 1e-4
    blocks_LBTD, logits_BTV = _run_theirs(case.theirs, [ids])
    outputs = _run_chunks(case.model, case.params, ids, counts, max(counts))
    assert _deviations(outputs, blocks_LBTD[:, 0], logits_BTV[0]) < TOLERANCE


def test_padded_batches_and_greedy_generation(tiny):
    """Left padding with a mask and explicit positions, as transformers wants them; and its own generation of them."""
    rows = [gpt_oss_random.tokens(seed, length) for seed, length in ((4, 17), (5, 1), (6, 9))]
    tokens, positions = gpt2_ours.pack(rows, 17, layout="left")
    real = positions >= 0
    ids, attended = torch.as_tensor(np.where(real, tokens, 0)).long(), torch.as_tensor(real).long()
    options = {"attention_mask": attended, "position_ids": torch.as_tensor(np.maximum(positions, 0)).long()}
    blocks_LBTD, logits_BTV = _run_theirs(tiny.theirs, ids, **options)
    outputs, _ = gpt_oss_ours.run(tiny.model, tiny.params, tokens, positions)
    for actual, expected in zip(outputs.blocks_LBTD, blocks_LBTD, strict=True):
        assert _deviation(actual[real], expected[real]) < TOLERANCE
    assert _deviation(outputs.logits_BTV[real], logits_BTV[real]) < TOLERANCE

    generated = tiny.theirs.generate(
        ids, attention_mask=attended, do_sample=False, max_new_tokens=20, pad_token_id=0, eos_token_id=None
    )
    assert _greedy(tiny, rows, 20) == generated[:, 17:].tolist()


@pytest.mark.parametrize("mutation", ["window", "sinks"])
def test_transformers_catches(tiny, mutation):
    """A window that is one position too wide, and sinks that take no part."""
    model, params = tiny.model, tiny.params
    if mutation == "window":
        model = registry.build(dataclasses.replace(model.config, windows=gpt_oss_ours.wider_windows(model.config)))
    else:
        params = gpt_oss_ours.without_sinks(params)
    ids = gpt_oss_random.tokens(1, 50)
    blocks_LBTD, logits_BTV = _run_theirs(tiny.theirs, [ids])
    for outputs in (
        _run_whole(model, params, ids),
        _run_chunks(model, params, ids, [20, *[1] * 30], 20),
    ):
        assert _deviations(outputs, blocks_LBTD[:, 0], logits_BTV[0]) > 1000 * TOLERANCE


def test_window_129_is_caught(tmp_path):
    case, ids = _case(tmp_path, PUBLISHED_WINDOW), gpt_oss_random.tokens(1, LENGTH)
    windows = gpt_oss_ours.wider_windows(case.model.config)
    assert windows == (129, None)
    wrong = registry.build(dataclasses.replace(case.model.config, windows=windows))
    blocks_LBTD, _ = _run_theirs(case.theirs, [ids])
    outputs = _run_whole(wrong, case.params, ids)
    # The first 128 tokens cannot tell; the sliding layer is wrong for the rest.
    assert _deviation(outputs.blocks_LBTD[0, :128], blocks_LBTD[0, 0, :128]) < TOLERANCE
    assert _deviation(outputs.blocks_LBTD[0, 128:], blocks_LBTD[0, 0, 128:]) > 100 * TOLERANCE


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> tuple[Case, list[int], np.ndarray, np.ndarray]:
    """A prompt of 4,300 tokens, and what transformers makes of it."""
    torch.set_num_threads(1)
    case, ids = _case(tmp_path_factory.mktemp("long"), LONG), gpt_oss_random.tokens(1, LONG_LENGTH)
    blocks_LBTD, logits_BTV = _run_theirs(case.theirs, [ids])
    return case, ids, blocks_LBTD[:, 0], logits_BTV[0]


# Angles of thousands of radians are rounded to a part of that, and their sines with them.
LONG_TOLERANCE = LONG_LENGTH * EPSILON


@pytest.mark.parametrize("counts", [[LONG_LENGTH], [1024, 1024, 1024, 1024, 200, *[1] * 4]], ids=["whole", "cached"])
def test_more_positions_than_yarns_original_context(long, counts):
    case, ids, blocks_LTD, logits_TV = long
    if len(counts) == 1:
        outputs = _run_whole(case.model, case.params, ids)
    else:
        outputs = _run_chunks(case.model, case.params, ids, counts, max(counts))
    assert _deviations(outputs, blocks_LTD, logits_TV) < LONG_TOLERANCE


@pytest.mark.parametrize("changes", [{"scaling": None}, {"factor": 16.0}, {"truncate": True}], ids=str)
def test_a_wrong_yarn_is_caught(long, changes):
    case, ids, blocks_LTD, logits_TV = long
    rope = case.model.config.rope
    rope = dataclasses.replace(
        rope, **(changes if "scaling" in changes else {"scaling": dataclasses.replace(rope.scaling, **changes)})
    )
    wrong = registry.build(dataclasses.replace(case.model.config, rope=rope))
    assert _deviations(_run_whole(wrong, case.params, ids), blocks_LTD, logits_TV) > 10 * LONG_TOLERANCE


@pytest.mark.parametrize("name", ["gpt-oss-20b", "gpt-oss-120b"])
def test_published_rotary_embedding(name):
    """Frequencies, and the cosines and sines of positions over the whole context."""
    config = PUBLISHED[name]
    assert isinstance(config, GptOssConfig)
    theirs = transformers.models.gpt_oss.modeling_gpt_oss.GptOssRotaryEmbedding(transformers.GptOssConfig())
    frequencies = inv_freq(config.rope, config.head_width)
    np.testing.assert_allclose(frequencies, theirs.inv_freq.numpy(), rtol=4 * EPSILON)
    assert frequencies[[0, 1, 8, 9, 17, 18, 31]] == pytest.approx(
        [1, 0.689044306, 0.0508132748, 0.0317056962, 1.29318701e-4, 3.83088124e-5, 3.02351143e-7], rel=1e-6
    )
    assert theirs.attention_scaling == pytest.approx(1.3465735903)
    positions = np.array([[0, 1, 127, 128, 4095, 4096, 20000, 131071]])
    cos, sin = theirs(torch.zeros(1), torch.as_tensor(positions))
    ours = rotation(config.rope, config.head_width, jnp.asarray(positions, jnp.int32))
    for actual, expected in zip(ours, (cos, sin), strict=True):
        error = np.abs(np.asarray(actual)[0, :, 0] - expected[0].numpy()).max(axis=1)
        assert (error < 4 * EPSILON * (1 + positions[0])).all()


def test_the_published_config_is_their_default():
    written = json.loads(transformers.GptOssConfig().to_json_string(use_diff=False))
    assert config_from_json(written) == dataclasses.replace(PUBLISHED["gpt-oss-120b"], mxfp4="none")


@pytest.mark.parametrize(
    "absent",
    [
        ("rope_theta",),
        ("rope_scaling",),
        ("rope_theta", "rope_scaling"),
        ("layer_types",),
        ("rms_norm_eps",),
        ("swiglu_limit",),
        ("attention_bias",),
        ("tie_word_embeddings",),
        ("hidden_act",),
        ("max_position_embeddings",),
        ("head_dim",),
        ("num_key_value_heads",),
        ("num_local_experts",),
        ("num_experts_per_tok",),
        ("sliding_window",),
        ("rope_scaling/truncate",),
        ("rope_scaling/beta_fast",),
        ("rope_scaling/beta_slow",),
        ("rope_scaling/original_max_position_embeddings",),
        ("rope_scaling/rope_type",),
    ],
    ids="+".join,
)
def test_an_absent_key_means_what_it_means_to_them_or_is_asked_for(absent):
    raw = json.loads(json.dumps(gpt_oss_random.CONFIG))
    for key in absent:
        section, _, name = key.rpartition("/")
        del (raw[section] if section else raw)[name]
    try:
        ours = config_from_json(raw)
    except ConfigError:
        return
    theirs = transformers.GptOssConfig(**json.loads(json.dumps(raw)))
    assert ours == config_from_json(json.loads(theirs.to_json_string(use_diff=False)))


def test_bfloat16_is_no_further_from_the_truth(tmp_path):
    """The weights rounded to bfloat16, every expert chosen (near-ties between experts would decide otherwise)."""
    checkpoint = gpt_oss_random.checkpoint(dtype=jnp.bfloat16, num_experts_per_tok=6)
    theirs = _theirs(checkpoint, torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ids = gpt_oss_random.tokens(7, 41)
    truth = gpt_oss_numpy.forward(checkpoint.dense, checkpoint.config, ids)
    blocks_LBTD, logits_BTV = _run_theirs(theirs, [ids])
    outputs = _run_whole(*gpt_oss_ours.load(tmp_path, jnp.bfloat16), ids)
    for ours, other, true in zip(outputs.blocks_LBTD, blocks_LBTD[:, 0], truth.blocks_LTD, strict=True):
        assert _rms(ours, true) < 1.1 * _rms(other, true)
    assert _rms(outputs.logits_BTV, truth.logits_TV) < 1.1 * _rms(logits_BTV[0], truth.logits_TV)
