"""What `convert.export` writes, read by transformers: nothing missing, nothing unexpected, and the same logits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import convert
import gptjax
from gptjax.config import read_config
from tests.convert import made
from tests.oracles import gpt_oss_random, llama_random

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.oracle

ROOT = Path(__file__).resolve().parents[2]
IDS = [[3, 14, 15, 92, 65, 35, 89, 79]]


def _loaded(directory: Path, **arguments: Any) -> Any:
    """transformers' model of a directory, which has exactly the tensors it wants."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager", **arguments
    )
    assert not any(info.values()), info
    return model.eval()


def _logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.float().numpy()


def _saved(model: Any, directory: Path) -> dict[str, Any]:
    model.save_pretrained(directory)
    return safetensors_torch.load_file(directory / "model.safetensors")


def _exported(tmp_path: Path, source: Path, **arguments: Any) -> Path:
    convert.convert(source, tmp_path / "converted")
    convert.export(tmp_path / "converted", tmp_path / "dst", **arguments)
    return tmp_path / "dst"


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("tied", [True, False])
def test_gpt2_is_as_transformers_saves_it(tmp_path, prefix, tied):
    made.gpt2(tmp_path / "src", prefix=prefix, tie_word_embeddings=tied)
    dst = _exported(tmp_path, tmp_path / "src", max_shard_bytes=100_000)
    model = _loaded(dst)
    assert np.array_equal(_logits(model), _logits(_loaded(tmp_path / "src")))
    theirs = _saved(model, tmp_path / "saved")
    ours = {name: x for path in dst.glob("*.safetensors") for name, x in safetensors_torch.load_file(path).items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("tied", [True, False])
def test_float_gpt_oss_is_as_transformers_saves_it(tmp_path, tied):
    source = gpt_oss_random.write(
        tmp_path / "src", gpt_oss_random.checkpoint(tie_word_embeddings=tied), layout="dequantised"
    )
    dst = _exported(tmp_path, source)
    model = _loaded(dst, experts_implementation="eager")
    assert np.array_equal(_logits(model), _logits(_loaded(source, experts_implementation="eager")))
    theirs, ours = _saved(model, tmp_path / "saved"), safetensors_torch.load_file(dst / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("variant", ["llama3.1", "llama biases", "mistral", "qwen2 window", "qwen3"])
def test_llama_is_as_transformers_saves_it(tmp_path, variant):
    source = llama_random.write(tmp_path / "src", llama_random.checkpoint(**llama_random.VARIANTS[variant]))
    dst = _exported(tmp_path, source)
    model = _loaded(dst)
    assert np.array_equal(_logits(model), _logits(_loaded(source)))
    theirs, ours = _saved(model, tmp_path / "saved"), safetensors_torch.load_file(dst / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("kind", ["packed", "original", "float, packed by us"])
def test_packed_gpt_oss_is_read_by_transformers(tmp_path, kind):
    layout = {"float, packed by us": "dequantised"}.get(kind, kind)
    source = gpt_oss_random.write(tmp_path / "src", gpt_oss_random.checkpoint(dtype=made.BFLOAT16), layout=layout)
    dst = _exported(tmp_path, source, quantize="experts" if layout == "dequantised" else None)
    raw = json.loads((dst / "config.json").read_text())
    assert raw["quantization_config"]["quant_method"] == "mxfp4"
    arguments = {"dtype": torch.float32, "quantization_config": transformers.Mxfp4Config(dequantize=True)}
    model = _loaded(dst, **arguments)
    with gptjax.load(dst, dtype="float32", max_length=16) as lm:
        ours = lm.logits(IDS[0])
    np.testing.assert_allclose(ours, _logits(model)[0], atol=1e-3)
    assert read_config(dst).mxfp4 == "experts"


@pytest.mark.parametrize("name", ["gpt2-tales", "gpt-oss-tales"])
def test_demos_by_way_of_a_conversion(tmp_path, name):
    """transformers reads the same from both directories, and so do we: the bits of all logits."""
    source = ROOT / "gptjax" / "demo" / name
    dst = _exported(tmp_path, source, max_shard_bytes=4_000_000)
    one, other = _loaded(source), _loaded(dst)
    assert np.array_equal(_logits(one), _logits(other))
    assert (
        transformers.AutoTokenizer.from_pretrained(dst)("The king")["input_ids"]
        == (transformers.AutoTokenizer.from_pretrained(source)("The king")["input_ids"])
    )
    logits = []
    for directory in (source, dst):
        with gptjax.load(directory, dtype="float32", max_length=16) as lm:
            logits.append(lm.logits(IDS[0]))
    assert made.same_bits(*logits)
