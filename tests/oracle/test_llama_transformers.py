"""Our Llama and the float64 oracle against transformers, live, on checkpoints that transformers writes itself.

Weights are those of `tests/oracles/llama_random.py`, put into transformers' model of the family, saved with
`save_pretrained` and read back from its `config.json` and safetensors.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptjax
from gptjax.config import PUBLISHED, LlamaConfig, config_from_json
from gptjax.config.llama import FAMILIES
from gptjax.diagnostics.transformers_comparison import compare, first_difference
from gptjax.errors import ConfigError
from gptjax.layers.rope import inv_freq
from gptjax.models import registry
from gptjax.models.params import Params, num_params
from gptjax.models.registry import Model
from tests.oracles import gpt2_ours, gpt_oss_ours, gpt_oss_random, llama_numpy, llama_ours, llama_random

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

EPSILON = float(jnp.finfo(jnp.float32).eps)
TOLERANCE = 128 * EPSILON  # of the largest magnitude; both compute in float32
LENGTH = 50  # more than five of the windows of 9
VARIANTS = llama_random.VARIANTS


class Case(NamedTuple):
    """A checkpoint on disk, by transformers and by us."""

    directory: Path
    checkpoint: llama_random.Checkpoint
    theirs: Any
    model: Model
    params: Params


@pytest.fixture(autouse=True)
def _highest_precision():
    torch.set_num_threads(1)
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def case(request, tmp_path_factory) -> Case:
    """One model for all tests of a variant."""
    return _case(tmp_path_factory.mktemp("checkpoint"), VARIANTS[request.param])


def _theirs(checkpoint: llama_random.Checkpoint) -> Any:
    raw = dict(checkpoint.config)
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw, attn_implementation="eager")
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    state = {name: torch.from_numpy(np.asarray(value)) for name, value in checkpoint.tensors.items()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()


def _case(directory: Path, changes: dict[str, Any]) -> Case:
    checkpoint = llama_random.checkpoint(**changes)
    theirs = _theirs(checkpoint)
    theirs.save_pretrained(directory)
    return Case(directory, checkpoint, theirs, *gpt_oss_ours.load(directory))


def _logits(theirs: Any, ids: Any, **options: Any) -> np.ndarray:
    with torch.no_grad():
        return theirs(torch.as_tensor(ids), use_cache=False, **options).logits.double().numpy()


def _deviation(actual: Any, expected: np.ndarray) -> float:
    assert actual.shape == expected.shape
    difference = np.abs(np.asarray(actual, np.float64) - expected).max()
    assert difference < 1e-3
    return float(difference / np.abs(expected).max())


every_variant = pytest.mark.parametrize("case", VARIANTS, indirect=True)


@every_variant
def test_the_float64_oracle(case):
    ids = gpt_oss_random.tokens(1, LENGTH)
    oracle = llama_numpy.forward(case.checkpoint.tensors, case.checkpoint.config, ids)
    assert _deviation(oracle.logits_TV, _logits(case.theirs, [ids])[0]) < TOLERANCE


@every_variant
def test_whole_and_cached(case):
    ids = gpt_oss_random.tokens(1, LENGTH)
    expected = _logits(case.theirs, [ids])[0]
    assert case.model.config == config_from_json(case.checkpoint.config)  # in both spellings
    assert _deviation(llama_ours.run_whole(case.model, case.params, ids).logits_BTV, expected) < TOLERANCE
    counts = [20, 17, *[1] * 13]
    outputs = llama_ours.run_chunks(case.model, case.params, ids, counts, 20)
    assert _deviation(outputs.logits_BTV, expected) < TOLERANCE


# An engine has windows, and numbers positions; what the model makes of these, the test above sees of each variant.
@pytest.mark.parametrize(
    "case", ["llama3.1", "llama biases", "mistral", "qwen2 window", "qwen2 yarn", "qwen3 window"], indirect=True
)
def test_greedy_tokens_of_a_batch_through_the_engine(case):
    """48 tokens after prompts of different lengths: left padding and a mask for transformers, slots for us."""
    rows = [gpt_oss_random.tokens(seed, length) for seed, length in ((4, 17), (5, 1), (6, 9))]
    tokens, positions = gpt2_ours.pack(rows, 17, layout="left")
    real = positions >= 0
    generated = case.theirs.generate(
        torch.as_tensor(np.where(real, tokens, 0)).long(),
        attention_mask=torch.as_tensor(real).long(),
        do_sample=False,
        max_new_tokens=48,
        pad_token_id=0,
        eos_token_id=None,
    )
    with gptjax.load(case.directory, dtype="float32", max_length=80, max_batch=3) as lm:
        completions = lm.generate(rows, max_tokens=48, temperature=0, ignore_eos=True)
        together = [list(each.token_ids) for each in completions]
        alone = lm.generate(rows[0], max_tokens=48, temperature=0, ignore_eos=True).token_ids
    assert together == generated[:, 17:].tolist()
    assert list(alone) == together[0]


@pytest.mark.parametrize("case", ["llama biases", "qwen2 window", "qwen3 window"], indirect=True)
def test_every_stage(case):
    rows = compare(case.model, case.params, case.directory, gpt_oss_random.tokens(1, LENGTH))
    assert first_difference(rows) is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": None, "head_dim": None},
        {"head_dim": 20, "rms_norm_eps": 1e-3, "rope_theta": 5e5, "tie_word_embeddings": True},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {key: value for key, value in llama_random.LLAMA3.items() if key[:8] != "original"}},
        {"sliding_window": 9},
        {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0},
        {"use_sliding_window": True, "max_window_layers": 1},
        {"sliding_window": None},
    ],
    ids=str,
)
def test_configs_mean_what_transformers_says(family, changes):
    """Whatever is absent or null, if it is not refused."""
    raw = {key: value for key, value in llama_random.CONFIG.items() if key[:3] in ("voc", "max", "hid", "int", "num")}
    not_null = {"mistral": "num_key_value_heads", "qwen3": "head_dim"}.get(family)  # to transformers' own classes
    raw |= {"model_type": family} | {
        key: value for key, value in changes.items() if value is not None or key != not_null
    }
    of_others = {"llama": ("sliding_window", "use_sliding_window"), "mistral": ("use_sliding_window",)}
    if any(changes.get(key) is not None for key in of_others.get(family, ())):
        with pytest.raises(ConfigError, match="sliding_window"):
            config_from_json(raw)
        return
    ours = config_from_json(raw)
    theirs = transformers.AutoConfig.for_model(**raw)
    types = getattr(theirs, "layer_types", ["sliding_attention"] * 2 if family == "mistral" else ["full_attention"] * 2)
    assert ours.windows == tuple(theirs.sliding_window if kind == "sliding_attention" else None for kind in types)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_width == (getattr(theirs, "head_dim", None) or 96 // 6)
    assert (ours.norm_epsilon, ours.tied_head) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert ours.out_bias == getattr(theirs, "attention_bias", False)
    rope = theirs.rope_parameters
    assert ours.rope.theta == rope["rope_theta"]
    if "factor" in rope:
        assert ours.rope.scaling.factor == rope["factor"]
    if rope["rope_type"] == "llama3":
        assert ours.rope.scaling.original_length == rope["original_max_position_embeddings"]


@pytest.mark.parametrize("name", [name for name, config in PUBLISHED.items() if isinstance(config, LlamaConfig)])
def test_published_sizes(name):
    """Their numbers of parameters, and rotary frequencies, on torch's device without memory."""
    config = PUBLISHED[name]
    raw = config.to_json()
    theirs_config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    assert config_from_json(theirs_config.to_dict()) == config
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(theirs_config)
    assert num_params(registry.build(config)) == theirs.num_parameters()
    rotary = type(theirs.model.rotary_emb)(theirs_config)
    np.testing.assert_allclose(inv_freq(config.rope, config.head_width), rotary.inv_freq.numpy(), rtol=4 * EPSILON)
