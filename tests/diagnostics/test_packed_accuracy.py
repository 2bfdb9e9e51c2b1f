"""`validate-quant`: a model and its packed form, its figures against sums written out, its thresholds and command."""

import dataclasses
import importlib.util
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
import gptjax
from gptjax.api import load_params
from gptjax.checkpoints.checkpoint import open_path
from gptjax.cli import main
from gptjax.config import read_config
from gptjax.diagnostics import packed_accuracy, perplexity
from gptjax.diagnostics.packed_accuracy import Difference, Report, WeightDifference
from gptjax.gguf import open_gguf
from gptjax.models import registry
from gptjax.models.params import weights_by_path
from gptjax.support import installation
from pallas_kernels.formats.fragments import MXFP4Fragments
from pallas_kernels.formats.ggml.fragments import QuantizedFragments
from pallas_kernels.formats.ggml.weight import Quantized, Rows
from pallas_kernels.formats.mxfp4 import MXFP4, quantize
from tests.oracles import gguf_from_hf, gpt_oss_random, llama_random
from tests.oracles.gguf_from_hf import Q4_0, Q8_0
from tests.shallow import LAYERS, shallow, shallow_directory

TOKENS = 300


@pytest.fixture(scope="module")
def demo(demo, tmp_path_factory) -> Path:
    return shallow_directory(demo, tmp_path_factory.mktemp("shallow") / "demo")


@pytest.fixture(scope="module")
def lm(demo):
    return gptjax.load(demo, dtype="float32")


@pytest.fixture(scope="module")
def ids(lm):
    return lm.tokenizer.encode(perplexity.HELD_OUT.read_text(encoding="utf-8"))[:TOKENS]


@pytest.fixture(scope="module")
def rounded(lm):
    return packed_accuracy.quantized(lm, "linear")


@pytest.fixture(scope="module")
def report(lm, rounded, ids):
    return packed_accuracy.validate(lm, rounded, ids)


@pytest.fixture(scope="module")
def converted(demo, tmp_path_factory) -> Path:
    """The demo with all that can be in MXFP4."""
    path = tmp_path_factory.mktemp("converted") / "all"
    convert.convert(demo, path, quantize="all")
    return path


def _random_gpt_oss(directory: Path, layout: str) -> gptjax.LanguageModel:
    """A tiny model in float32, without a tokenizer."""
    gpt_oss_random.write(directory, gpt_oss_random.checkpoint(), layout=layout)
    return gptjax.load(directory, dtype="float32", max_length=64)


def test_what_is_rounded_in_memory_is_what_conversion_writes(lm, converted):
    model = registry.build(read_config(converted))
    found = packed_accuracy.quantized(lm, "all")
    assert found.model == model
    expected = weights_by_path(load_params(open_path(converted), model))
    for path, leaf in weights_by_path(found.params).items():
        assert isinstance(leaf, MXFP4) == isinstance(expected[path], MXFP4)
        for one, other in zip(jax.tree.leaves(leaf), jax.tree.leaves(expected[path]), strict=True):
            np.testing.assert_array_equal(one, other)


def test_what_is_not_rounded_is_shared(lm, rounded):
    assert rounded.params["token_embedding"] is lm.params["token_embedding"]
    assert rounded.params["block_1"]["mlp"]["up"]["bias"] is lm.params["block_1"]["mlp"]["up"]["bias"]


@pytest.mark.thorough
def test_weights_written_out(lm, report):
    """All products of the blocks, in their order; here [in, out] both, in the other axes' order than packed."""
    names = [f"{part}/kernel" for part in ("attention/out", "attention/qkv", "mlp/down", "mlp/up")]
    blocks = [f"block_{layer}" for layer in range(LAYERS)]
    assert [row.name for row in report.weights] == [f"{block}/{name}" for block in blocks for name in names]
    for row in report.weights:
        leaf = np.asarray(weights_by_path(lm.params)[tuple(row.name.split("/"))], np.float64)
        other = np.asarray(quantize(jnp.asarray(leaf.T, jnp.float32)).dequantize().T, np.float64)
        cosine = (leaf * other).sum() / np.linalg.norm(leaf) / np.linalg.norm(other)
        assert row.cosine == pytest.approx(cosine, rel=1e-9)
        assert row.error == pytest.approx(np.linalg.norm(other - leaf) / np.linalg.norm(leaf), rel=1e-9)


def test_hidden_states_written_out(lm, rounded, report, ids):
    ours, theirs = lm.activations(ids), rounded.activations(ids)
    assert [row.name for row in report.blocks] == [f"block_{layer}" for layer in range(LAYERS)]
    for row in report.blocks:
        a, b = (each[f"{row.name}/mlp_residual"].astype(np.float64) for each in (ours, theirs))
        norms = [np.linalg.norm(x, axis=-1) for x in (a, b, b - a)]
        assert row.cosine == pytest.approx(((a * b).sum(axis=-1) / norms[0] / norms[1]).mean(), rel=1e-5)
        assert row.error == pytest.approx((norms[2] / norms[0]).mean(), rel=1e-4)


def test_predictions_written_out(lm, rounded, report, ids):
    one, other = (each.logits(ids)[:-1].argmax(axis=-1) for each in (lm, rounded))
    assert report.agreement == (one == other).mean()
    assert report.perplexity == perplexity.perplexity(lm, ids)
    assert report.quantized_perplexity == perplexity.perplexity(rounded, ids)


@pytest.mark.thorough
def test_numbers_that_mxfp4_has_are_the_same_model(tmp_path):
    """Experts that were dequantised: nothing changes, and every threshold holds."""
    lm = _random_gpt_oss(tmp_path, "dequantised")
    other = packed_accuracy.quantized(lm, "experts")
    report = packed_accuracy.validate(lm, other, gpt_oss_random.tokens(0, 60))
    assert {row.name.partition("/")[2] for row in report.weights} == {"moe/gate_up_kernel", "moe/down_kernel"}
    assert all(row.error == 0 and row.cosine == pytest.approx(1, abs=1e-15) for row in report.weights)
    assert [row.name for row in report.blocks] == ["block_0", "block_1", "block_2"]
    assert all(row.error < 1e-5 and row.cosine > 1 - 1e-9 for row in report.blocks)
    assert report.agreement == 1
    assert report.quantized_perplexity.value == pytest.approx(report.perplexity.value, rel=1e-5)
    assert report.passed


@pytest.mark.thorough
def test_what_is_packed_on_both_sides_is_not_compared(tmp_path):
    lm = _random_gpt_oss(tmp_path, "packed")
    report = packed_accuracy.validate(lm, packed_accuracy.quantized(lm, "all"), gpt_oss_random.tokens(0, 60))
    names = {re.sub(r"block_\d", "block", row.name) for row in report.weights}
    assert names == {"block/attention/qkv/kernel", "block/attention/out/kernel", "token_embedding", "head_embedding"}
    assert [row.name for row in report.weights][-2:] == ["head_embedding", "token_embedding"]


@pytest.mark.thorough
def test_a_gguf_file_written_out(tmp_path):
    """Packed weights, one of them of parts in several types, and experts, which are expanded when they are loaded."""
    model = gpt_oss_random.checkpoint(5, num_hidden_layers=1, layer_types=["sliding_attention"])
    types = {"attn_q.weight": Q8_0, "attn_k.weight": Q8_0, "attn_v.weight": Q4_0, "output.weight": Q4_0}
    tensors = {name: np.float32(array) for name, array in model.dense.items()}
    path = gguf_from_hf.write(
        tmp_path / "model.gguf", model.config, tensors, types=types | {"ffn_down_exps.weight": Q8_0}
    )
    directory = gpt_oss_random.write(tmp_path / "hf", model, layout="dense")
    lm, other = (gptjax.load(each, dtype="float32", max_length=64, packed=True) for each in (directory, path))
    report = packed_accuracy.validate(lm, other, gpt_oss_random.tokens(0, 60))
    assert {row.name: row.types for row in report.weights} == {
        "block_0/attention/qkv/kernel": ("Q8_0", "Q4_0"),
        "block_0/moe/down_kernel": ("float32",),
        "block_0/attention/out/kernel": ("Q4_0",),
        "head_embedding": ("Q4_0",),
    }
    assert report.types == ("Q4_0", "Q8_0", "float32")
    file, sources = open_gguf(path), {"head_embedding": "output", "block_0/moe/down_kernel": "blk.0.ffn_down_exps"}
    sources["block_0/attention/out/kernel"] = "blk.0.attn_output"
    parts = [file.read(f"blk.0.attn_{part}.weight") for part in "qkv"]
    for row in report.weights:
        leaf = np.asarray(weights_by_path(lm.params)[tuple(row.name.split("/"))], np.float64)
        theirs = file.read(f"{sources[row.name]}.weight") if row.name in sources else np.concatenate(parts)
        leaf = leaf.swapaxes(-1, -2) if row.name.endswith("kernel") else leaf
        assert row.error == pytest.approx(np.linalg.norm(theirs - leaf) / np.linalg.norm(leaf), rel=1e-9)


@pytest.mark.thorough
def test_weights_repacked_for_tensor_cores():
    """As on a Hopper GPU in bfloat16: the numbers and the types are the same."""
    packed = {name: Quantized.random(jax.random.key(1), (64, 256), name) for name in ("Q4_K", "Q8_0")}
    fragments = {name: QuantizedFragments.of(weight) for name, weight in packed.items()}
    rounded = quantize(jax.random.normal(jax.random.key(2), (64, 128)))
    for weight, numbers, types in (
        (MXFP4Fragments.of(rounded), rounded.dequantize(), ("MXFP4",)),
        (fragments["Q4_K"], packed["Q4_K"].dequantize(), ("Q4_K",)),
        (Rows(tuple(fragments.values())), Rows(tuple(packed.values())).dequantize(), ("Q4_K", "Q8_0")),
    ):
        (row,) = packed_accuracy._weights({"head_embedding": numbers}, {"head_embedding": weight})
        assert (row.error, row.types) == (0, types)


def test_two_ways_to_write_a_rotation_are_the_same_model(tmp_path):
    """Llama 3's GGUF files have the divisors, its config.json their formula."""
    model = llama_random.checkpoint(6, **llama_random.VARIANTS["llama3.1"])
    path = gguf_from_hf.write(tmp_path / "model.gguf", *model)
    ours, theirs = (open_path(each).config for each in (llama_random.write(tmp_path / "hf", model), path))
    assert ours != theirs
    assert packed_accuracy._unlike(ours, theirs) == []
    other = dataclasses.replace(theirs, rope=dataclasses.replace(theirs.rope, theta=theirs.rope.theta + 1))
    assert packed_accuracy._unlike(ours, other) == ["rope"]
    assert packed_accuracy._unlike(ours, dataclasses.replace(theirs, norm_epsilon=0.5)) == ["rope", "norm_epsilon"]


@pytest.mark.parametrize("name", ["gpt2-tales", "gpt-oss-tales"])
def test_keys_and_values_in_float8(name, ids):
    """Little changes, the same little with a cache and without; and the model agrees with itself as it generates."""
    lm = shallow(name)
    cached = packed_accuracy.cached(lm, "fp8")
    ids = [token % lm.config.vocab_size for token in ids[:200]]
    report = packed_accuracy.validate(lm, cached, ids)
    assert (report.weights, report.types, report.cache_dtype, report.passed) == ((), (), "fp8", True)
    assert all(1e-4 < row.error < 0.05 for row in report.blocks)
    logits, other = lm.logits(ids), cached.logits(ids)
    alone = cached.activations(ids)["logits"]
    assert np.abs(alone - other).max() < 0.1 * np.abs(logits - other).max()  # a key at a tie may be rounded otherwise
    assert np.square(alone - other).mean() < 1e-4 * np.square(logits - other).mean()
    text = cached.generate(ids[:150], max_tokens=20, ignore_eos=True, temperature=0)
    wanted = cached.logits([*ids[:150], *text.token_ids])[149:-1]
    np.testing.assert_array_equal(text.token_ids, wanted.argmax(axis=-1))
    wanted -= np.log(np.exp(wanted.astype(np.float64)).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(text.logprobs, wanted.max(axis=-1), atol=1e-3)


def test_nothing_to_compare_is_refused(tmp_path, lm):
    packed = _random_gpt_oss(tmp_path, "packed")
    with pytest.raises(gptjax.RequestError, match=r"already has 'experts' in MXFP4.*name the float checkpoint"):
        packed_accuracy.quantized(packed, "experts")
    with pytest.raises(gptjax.ConfigError, match="no experts"):
        packed_accuracy.quantized(lm, "experts")
    with pytest.raises(gptjax.RequestError, match=r"not forms of the same model.*differ in architecture"):
        packed_accuracy.validate(lm, packed, [1, 2, 3])
    with pytest.raises(gptjax.RequestError, match="name the float checkpoint first"):
        packed_accuracy.validate(lm, lm, [1, 2, 3])
    with pytest.raises(gptjax.RequestError, match="name the float checkpoint first"):
        packed_accuracy.validate(packed_accuracy.quantized(lm, "linear"), lm, [1, 2, 3])


@pytest.mark.parametrize(
    ("numbers", "others", "cosine", "error"),
    [
        ([3.0, 4.0], [3.0, 4.0], 1.0, 0.0),
        ([3.0, 4.0], [-3.0, -4.0], -1.0, 2.0),
        ([1.0, 0.0], [0.0, 1.0], 0.0, 2**0.5),
        ([0.0, 0.0], [0.0, 0.0], 1.0, 0.0),
        ([3.0, 4.0], [0.0, 0.0], 0.0, 1.0),
        ([0.0, 0.0], [3.0, 4.0], 0.0, 1.0),
    ],
)
def test_cosine_and_error(numbers, others, cosine, error):
    """Also of zeros, which have no direction."""
    found = packed_accuracy._difference(
        "x", [(np.array([[a]]), np.array([[b]])) for a, b in zip(numbers, others, strict=True)]
    )
    assert (found.cosine, found.error) == (pytest.approx(cosine), pytest.approx(error))


def test_blocks_are_in_the_order_of_their_numbers():
    paths = [("token_embedding",), ("block_10", "b"), ("block_2", "b"), ("block_2", "a"), ("head_embedding",)]
    expected = [("block_2", "a"), ("block_2", "b"), ("block_10", "b"), ("head_embedding",), ("token_embedding",)]
    assert sorted(paths, key=packed_accuracy._place) == expected


def _report(*, weight=0.99, block=0.99, agreement=0.95, change=0.0099) -> Report:
    base = perplexity.Perplexity(100.0, 1.0, 10)
    return Report(
        weights=(
            WeightDifference("block_0/a", weight, 0.1, ("MXFP4",)),
            WeightDifference("block_1/a", 0.999, 0.01, ("MXFP4",)),
        ),
        blocks=(Difference("block_0", 0.999, 0.01), Difference("block_1", block, 0.1)),
        agreement=agreement,
        perplexity=base,
        quantized_perplexity=dataclasses.replace(base, value=100.0 * (1 + change)),
    )


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, []),
        ({"weight": 0.98999}, [0]),
        ({"block": 0.98999}, [1]),
        ({"agreement": 0.94999}, [2]),
        ({"change": 0.0101}, [3]),
        ({"change": -0.0101}, [3]),
        ({"change": -0.0099}, []),
        ({"weight": 0.5, "block": 0.5, "agreement": 0.5, "change": 0.5}, [0, 1, 2, 3]),
    ],
)
def test_thresholds(changes, failing):
    report = _report(**changes)
    assert [place for place, verdict in enumerate(report.verdicts) if not verdict.holds] == failing
    assert report.passed == (not failing)


# The command


def _run(capsys, *argv: str) -> tuple[int, str, str]:
    status = main(["validate-quant", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_tells_and_judges(capsys, report, demo):
    status, out, err = _run(capsys, str(demo), "--tokens", str(TOKENS))
    assert (status, err) == (0 if report.passed else 1, "")
    for row, types in [(row, " +MXFP4") for row in report.weights] + [(row, "") for row in report.blocks]:
        assert re.search(rf"^{row.name} +{row.cosine:.5f} +{row.error:.2%}{types}$", out, re.M)
    assert "perplexity in MXFP4: " in out
    for verdict in report.verdicts:
        line = f"{verdict.name}: {verdict.found} (threshold: {verdict.wanted})"
        assert f"{'ok  ' if verdict.holds else 'FAIL'}  {line}" in out.splitlines()


def test_the_command_compares_a_cache_in_float8(capsys, demo):
    status, out, _ = _run(capsys, str(demo), "--tokens", "64", "--cache-dtype", "fp8")
    assert (status, out.count("ok  "), out.count("MXFP4")) == (0, 3, 0)
    assert "perplexity with keys and values in fp8: " in out
    assert not re.search("^weight", out, re.M)


@pytest.mark.thorough
def test_a_converted_directory_and_json(capsys, lm, demo, converted, ids):
    argv = [str(demo), "--against", str(converted), "--tokens", "40", "--json"]
    status, out, _ = _run(capsys, *argv)
    facts = json.loads(out)
    expected = packed_accuracy.validate(lm, packed_accuracy.quantized(lm, "all"), ids[:40])
    assert facts["weights"] == [json.loads(json.dumps(dataclasses.asdict(row))) for row in expected.weights]
    assert len(facts["weights"]) == LAYERS * 4 + 1
    assert facts["agreement"] == expected.agreement
    assert facts["passed"] == all(verdict["holds"] for verdict in facts["verdicts"]) == (status == 0)


@pytest.mark.thorough
def test_a_gguf_file_of_the_demo(capsys, demo, tmp_path):
    """All products and the embedding, in Q8_0, which keeps every threshold."""
    types = dict.fromkeys(("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "token_embd.weight"), Q8_0)
    tensors = {name: np.float32(array) for name, array in load_file(demo / "model.safetensors").items()}
    config = json.loads((demo / "config.json").read_text())
    path = gguf_from_hf.write(tmp_path / "model.gguf", config, tensors, types)
    status, out, _ = _run(capsys, str(demo), "--against", str(path), "--tokens", "100")
    assert (status, len(re.findall(r"%  Q8_0$", out, re.M)), out.count("ok  ")) == (0, 3 * LAYERS + 1, 4)
    assert "perplexity in Q8_0: " in out


@pytest.mark.thorough
def test_all_thresholds_held_is_status_0(capsys, tmp_path, demo):
    """The demo with products that MXFP4 has."""
    shutil.copytree(demo, tmp_path / "exact", ignore=shutil.ignore_patterns("*.safetensors"))
    _write_exact(demo, tmp_path / "exact")
    status, out, _ = _run(capsys, str(tmp_path / "exact"), "--tokens", "100")
    assert (status, out.count("ok  "), out.count("FAIL")) == (0, 4, 0)


def _write_exact(demo: Path, directory: Path) -> None:
    tensors = load_file(demo / "model.safetensors")
    for name, array in tensors.items():
        if array.ndim == 2 and ".h." in f".{name}":
            numbers = quantize(jnp.asarray(array.T, jnp.float32)).dequantize().T
            tensors[name] = np.ascontiguousarray(numbers, np.float32)
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--quantize", "mxfp4=experts"], "no experts; choose linear"),
        (["gpt-oss-tales", "--quantize", "mxfp4=experts"], "name the float checkpoint"),
        (["--against", "gpt2-tales"], "name the float checkpoint first"),
        (["--tokens", "1"], "--tokens must be at least 2"),
        (["--text", "/no/such/text"], "cannot be read"),
        (["--against", "/no/such/place"], "/no/such/place"),
    ],
)
def test_errors(capsys, argv, says):
    status, out, err = _run(capsys, *argv)
    assert (status, out) == (1, "")
    assert says in err


def test_a_choice_or_a_directory_and_not_both(capsys):
    with pytest.raises(SystemExit):
        main(["validate-quant", "--quantize", "mxfp4=all", "--against", "somewhere"])
    assert "not allowed with" in capsys.readouterr().err


# The plot


def test_without_matplotlib_the_command_to_install_it_is_told_first(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert _run(capsys, "--plot", "errors.png")[2] == (
        f"gptjax: plotting needs matplotlib, which is not installed: {installation.with_extra('plot')}\n"
    )


@pytest.mark.parametrize(
    ("path", "says"), [("errors.txt", ".png, .pdf or .svg"), ("no/such/errors.png", "create it first")]
)
def test_files_that_cannot_be_plotted_to(monkeypatch, tmp_path, path, says):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(gptjax.RequestError, match=says):
        packed_accuracy.check_plot(tmp_path / path)


@pytest.mark.parametrize("name", ["errors.png", "errors.SVG"])
def test_a_plot(report, tmp_path, name):
    pytest.importorskip("matplotlib")
    packed_accuracy.plot(report, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    assert content.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    (tmp_path / "errors.pdf").mkdir()
    with pytest.raises(gptjax.RequestError, match="cannot be written"):
        packed_accuracy.plot(report, tmp_path / "errors.pdf")
