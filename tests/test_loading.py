"""`gptjax.load`: what it refuses, its settings, and that what it loads gives the recorded tokens."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

import convert
import gptjax
from gptjax import CapacityError, CheckpointError, ConfigError, RequestError
from tests.gguf import made
from tests.thinned import thorough

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Once upon a time there was a king who had"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"max_length": 513}, CapacityError, "513.*512"),
        ({"max_length": 0}, RequestError, "max_length"),
        ({"max_length": 2.0}, RequestError, "max_length"),
        ({"max_batch": 0}, RequestError, "max_batch"),
        ({"dtype": "int8"}, ConfigError, "float32, bfloat16, float16"),
        ({"dtype": "nonsense"}, ConfigError, "nonsense"),
        ({"cache_dtype": "int8"}, ConfigError, "cache_dtype 'int8' is not supported; choose fp8, or leave it out"),
        ({"implementation": "cuda"}, RequestError, "cuda.*xla"),
        ({"tokenizer": "/nowhere"}, CheckpointError, "nowhere"),
    ],
)
def test_bad_settings_name_the_fault(demo, options, error, says):
    with pytest.raises(error, match=says):
        gptjax.load(demo, **options)


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [("513", CapacityError, "GPTJAX_MAX_LENGTH is 513"), ("-4", RequestError, "-4"), ("x", RequestError, "x")],
)
def test_the_environment_can_set_max_length_but_not_too_far(demo, monkeypatch, value, error, says):
    monkeypatch.setenv("GPTJAX_MAX_LENGTH", value)
    with pytest.raises(error, match=says):
        gptjax.load(demo)
    monkeypatch.setenv("GPTJAX_MAX_LENGTH", "64")
    assert gptjax.load(demo).max_length == 64
    assert gptjax.load(demo, max_length=32).max_length == 32


def test_a_shorter_max_length_holds(demo):
    lm = gptjax.load(demo, max_length=20)
    with pytest.raises(CapacityError, match="shorten the prompt by 1"):
        lm.generate([1] * 21)
    assert lm.generate([1] * 18, max_tokens=50, ignore_eos=True).usage.completion_tokens == 3


@pytest.mark.parametrize("dtype", ["bfloat16", thorough("float16")])
def test_other_dtypes(demo, dtype):
    lm = gptjax.load(demo, dtype=dtype)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(lm.params)} == {dtype}
    assert lm.generate(PROMPT, max_tokens=5).usage.completion_tokens == 5


def test_without_a_tokenizer_ids_work_and_text_says_what_is_missing(demo, tmp_path):
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        shutil.copy(demo / name, tmp_path)
    lm = gptjax.load(tmp_path)
    completion = lm.generate([5, 6, 7], max_tokens=4)
    assert (completion.text, len(completion.token_ids)) == ("", 4)
    for call in (lambda: lm.generate("text"), lambda: lm.generate([1], stop="x"), lambda: lm.tokenizer):
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            call()
    assert gptjax.load(tmp_path, tokenizer=demo).generate("text", max_tokens=1).token_ids
    (tmp_path / "model.gguf").write_bytes(made.file(made.tokenizer()))
    assert gptjax.load(tmp_path, tokenizer=tmp_path / "model.gguf").generate("abba", max_tokens=1).token_ids


def test_a_damaged_tokenizer_is_not_a_missing_one(demo, tmp_path):
    shutil.copytree(demo, tmp_path / "damaged")
    (tmp_path / "damaged" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        gptjax.load(tmp_path / "damaged")


def test_generation_config_sets_the_defaults(demo, tmp_path):
    shutil.copytree(demo, tmp_path / "sampled")
    (tmp_path / "sampled" / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 1.5, "top_k": 40, "eos_token_id": [8191, 7]})
    )
    lm = gptjax.load(tmp_path / "sampled")
    assert (lm.defaults.temperature, lm.defaults.top_k, lm.eos_ids) == (1.5, 40, (8191, 7))
    assert (
        lm.generate(PROMPT, max_tokens=9, seed=1).token_ids
        == lm.generate(PROMPT, max_tokens=9, seed=1, temperature=1.5, top_k=40).token_ids
    )
    assert (
        lm.generate(PROMPT, max_tokens=9, temperature=0).token_ids
        == gptjax.load(demo).generate(PROMPT, max_tokens=9).token_ids
    )


GOLDEN = ROOT / "tests" / "data" / "golden"


@pytest.mark.parametrize(
    ("form", "max_batch"),
    [
        ("Hugging Face", 4),
        ("converted", 4),
        thorough("Hugging Face", None),
        thorough("Hugging Face", 1),
        thorough("converted", None),
        thorough("converted", 1),
    ],
)
def test_the_recorded_greedy_tokens_end_to_end(demo, tmp_path, form, max_batch):
    """Text in, transformers' tokens out: through the tokenizer, the loader, the engine and the sampler."""
    directory = demo
    if form == "converted":
        directory = tmp_path / "converted"
        convert.convert(demo, directory)
    prompts = json.loads((GOLDEN / "prompts.json").read_text())["gpt2-tales"]
    recorded = np.load(GOLDEN / "gpt2-tales.npz")
    lm = gptjax.load(directory, dtype="float32", max_batch=max_batch)
    greedy = [tuple(recorded[f"greedy_{n}"].tolist()) for n in range(len(prompts))]
    together = lm.generate(prompts, max_tokens=48, ignore_eos=True)
    assert [completion.token_ids for completion in together] == greedy
    for prompt, tokens in zip(prompts, greedy, strict=True):
        assert lm.generate(prompt, max_tokens=48, ignore_eos=True).token_ids == tokens


def test_close_frees_the_weights(demo):
    with gptjax.load(demo) as lm:
        leaf = jax.tree.leaves(lm.params)[0]
        assert not leaf.is_deleted()
    assert leaf.is_deleted()


def test_nothing_is_written_where_loading_fails(demo, tmp_path):
    shutil.copytree(demo, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    before = sorted(path.name for path in (tmp_path / "cut").iterdir())
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        gptjax.load(tmp_path / "cut")
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == before
