"""GPT-2's table: the names of all manners of files, against the tests' own mapping of names."""

import json

import ml_dtypes
import numpy as np
import pytest

from convert import gpt2, open_params
from convert.rules import Rule
from gptjax.checkpoints.checkpoint import open_path
from gptjax.config import PUBLISHED, GPT2Config, config_from_json
from gptjax.errors import CheckpointError
from gptjax.models.params import abstract_params
from gptjax.models.registry import build
from tests.convert import made
from tests.convert.conversion_material import streamed
from tests.oracles import gpt2_ours


def _refused(directory, *parts):
    with pytest.raises(CheckpointError) as caught:
        streamed(directory)
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("shards", [0, 3])
@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, made.BFLOAT16])
def test_every_weight_is_where_it_belongs(tmp_path, prefix, tied, shards, dtype):
    _, tensors = made.gpt2(tmp_path, prefix=prefix, dtype=dtype, shards=shards, tie_word_embeddings=tied)
    found = streamed(tmp_path)
    assert found.keys() == {gpt2_ours.target(name) for name in tensors}
    for name, expected in tensors.items():
        assert made.same_bits(found[gpt2_ours.target(name)], expected)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_mask_buffers_are_dropped(tmp_path, prefix):
    _, tensors = made.gpt2(tmp_path)
    for layer in range(3):
        tensors[f"h.{layer}.attn.bias"] = np.tri(37, dtype=np.uint8).reshape(1, 1, 37, 37)
        tensors[f"h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    made.write_gpt2(tmp_path, tensors, prefix=prefix)
    assert len(streamed(tmp_path)) == len(tensors) - 6


@pytest.mark.parametrize("dtype", [np.float32, np.float16, made.BFLOAT16])
def test_an_equal_head_is_dropped_where_it_is_tied(tmp_path, dtype):
    _, tensors = made.gpt2(tmp_path, dtype=dtype)
    made.write_gpt2(tmp_path, tensors | {"lm_head.weight": tensors["wte.weight"]}, prefix="transformer.")
    assert "head_embedding" not in streamed(tmp_path)


def test_a_head_that_differs_by_a_bit_is_refused_where_it_is_tied(tmp_path):
    _, tensors = made.gpt2(tmp_path)
    head = tensors["wte.weight"].copy()
    head.view(np.uint32)[100, 59] ^= 1
    made.write_gpt2(tmp_path, tensors | {"lm_head.weight": head})
    _refused(tmp_path, "lm_head.weight differs from wte.weight", "set tie_word_embeddings to false in config.json")


@pytest.mark.parametrize("head", [np.float32, np.float16])
def test_a_tied_head_in_another_dtype_is_a_copy_if_it_agrees_when_rounded(tmp_path, head):
    _, tensors = made.gpt2(tmp_path)
    embedding = tensors["wte.weight"].astype(np.float16 if head == np.float32 else np.float32)
    both = {"wte.weight": embedding, "lm_head.weight": tensors["wte.weight"].astype(head)}
    made.write_gpt2(tmp_path, tensors | both)
    assert made.same_bits(streamed(tmp_path)["token_embedding"], embedding)
    both["lm_head.weight"][3, 4] += 1
    made.write_gpt2(tmp_path, tensors | both)
    message = _refused(tmp_path, "lm_head.weight differs from wte.weight, F", "even when rounded")
    assert "shape" not in message


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_tied_tensor_may_be_stored_as_the_head_only(tmp_path, prefix):
    """What safetensors' own `save_model` does."""
    _, tensors = made.gpt2(tmp_path)
    expected = streamed(tmp_path)
    stored = {("lm_head.weight" if name == "wte.weight" else name): array for name, array in tensors.items()}
    made.write_gpt2(tmp_path, stored, prefix=prefix)
    found = streamed(tmp_path)
    assert found.keys() == expected.keys()
    assert all(made.same_bits(found[name], array) for name, array in expected.items())


def test_a_head_is_not_the_embedding_of_an_untied_model(tmp_path):
    _, tensors = made.gpt2(tmp_path, tie_word_embeddings=False)
    del tensors["wte.weight"]
    made.write_gpt2(tmp_path, tensors)
    _refused(tmp_path, "1 tensor missing:\n    wte.weight")


HEADS = {  # class, and the shapes of what it has besides the body
    "GPT2DoubleHeadsModel": {"multiple_choice_head.summary.weight": (1, 60), "multiple_choice_head.summary.bias": (1,)},
    "TRL's value head": {"v_head.summary.weight": (1, 60), "v_head.summary.bias": (1,)},
    "GPT2ForSequenceClassification": {"score.weight": (2, 60)},
    "GPT2ForTokenClassification": {"classifier.weight": (2, 60), "classifier.bias": (2,)},
    "GPT2ForQuestionAnswering": {"qa_outputs.weight": (2, 60), "qa_outputs.bias": (2,)},
}


@pytest.mark.parametrize("kind", HEADS)
def test_heads_beside_a_language_models_own_are_dropped(tmp_path, kind):
    _, tensors = made.gpt2(tmp_path)
    expected = streamed(tmp_path).keys()
    more = {name: np.ones(shape, np.float32) for name, shape in HEADS[kind].items()}
    made.write_gpt2(tmp_path, tensors | more | {"lm_head.weight": tensors["wte.weight"]})
    assert streamed(tmp_path).keys() == expected


@pytest.mark.parametrize("kind", HEADS)
def test_heads_in_place_of_a_language_models_own(tmp_path, kind):
    """The first two are always trained together with lm_head, which in a tied model is the embedding."""
    _, tensors = made.gpt2(tmp_path)
    expected = streamed(tmp_path).keys()
    made.write_gpt2(tmp_path, tensors | {name: np.ones(shape, np.float32) for name, shape in HEADS[kind].items()})
    if "For" not in kind:
        assert streamed(tmp_path).keys() == expected
        return
    name = next(iter(HEADS[kind]))
    message = _refused(tmp_path, "of another kind of model", f"{name} is a head that", "not a language model")
    assert "GPT2LMHeadModel.from_pretrained(directory).save_pretrained" in message


def test_an_untied_head_is_required(tmp_path):
    _, tensors = made.gpt2(tmp_path, tie_word_embeddings=False)
    del tensors["lm_head.weight"]
    made.write_gpt2(tmp_path, tensors)
    _refused(tmp_path, "1 tensor missing:", "lm_head.weight", "set tie_word_embeddings to true")


def test_a_mixture_of_prefixes_is_refused(tmp_path):
    _, tensors = made.gpt2(tmp_path)
    renamed = {("transformer." + name if name.startswith("h.1.") else name): a for name, a in tensors.items()}
    made.write_gpt2(tmp_path, renamed)
    _refused(tmp_path, "1 tensor with inconsistent prefixes", "has a prefix")


def test_a_transposed_weight_is_refused(tmp_path):
    """[out, in], as torch's Linear has it; the square one can only be told by the others."""
    _, tensors = made.gpt2(tmp_path)
    turned = {name: a.T.copy() if a.ndim == 2 and name.startswith("h.") else a for name, a in tensors.items()}
    made.write_gpt2(tmp_path, turned)
    _refused(tmp_path, "9 tensors of the wrong shape", "h.0.attn.c_attn.weight is [180, 60], expected [60, 180]")


@pytest.mark.parametrize("dtype", [np.int32, np.float64, ml_dtypes.float8_e4m3fn])
def test_other_dtypes_are_refused(tmp_path, dtype):
    _, tensors = made.gpt2(tmp_path)
    made.write_gpt2(tmp_path, tensors | {"ln_f.bias": tensors["ln_f.bias"].astype(dtype)})
    _refused(
        tmp_path, "1 tensor of the wrong dtype", f"ln_f.bias is {made.DTYPE_NAMES[np.dtype(dtype).name]}, expected F32"
    )


def test_faults_are_raised_before_the_first_weight(tmp_path):
    _, tensors = made.gpt2(tmp_path)
    made.write_gpt2(tmp_path, tensors | {"h.3.ln_1.bias": tensors["ln_f.bias"]})
    with pytest.raises(CheckpointError, match=r"1 tensor unknown:\n    h\.3\.ln_1\.bias \(the model has no block_3"):
        open_params(open_path(tmp_path))


@pytest.mark.parametrize("name", [name for name, config in PUBLISHED.items() if isinstance(config, GPT2Config)])
@pytest.mark.parametrize("tied", [True, False])
def test_published_sizes_have_a_row_for_each_weight(name, tied):
    raw = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024, "tie_word_embeddings": tied}
    size = PUBLISHED[name]
    config = config_from_json(raw | {"n_embd": size.width, "n_layer": size.num_layers, "n_head": size.num_heads})
    targets = made.flat_shapes(abstract_params(build(config)))
    rows = [rule.target.replace("{N}", str(i)) for rule in gpt2.table(config, ()).rules for i in _layers(rule, config)]
    assert sorted(rows) == sorted(targets)


def _layers(rule: Rule, config):
    return range(config.num_layers) if "{N}" in rule.target else range(1)


def test_the_demo(demo):
    found = streamed(demo)
    assert len(found) == 76
    assert json.loads((demo / "config.json").read_text())["dtype"] == "bfloat16"
    assert {array.dtype for array in found.values()} == {made.BFLOAT16}
