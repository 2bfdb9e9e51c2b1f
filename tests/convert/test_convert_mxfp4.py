"""`convert(..., quantize=)`: which weights are rounded, to what bits, and that the rest is as it was."""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
import gptjax
from convert import mxfp4
from convert.__main__ import main
from gptjax import api
from gptjax.checkpoints.checkpoint import open_path
from gptjax.checkpoints.manifest import read_manifest
from gptjax.checkpoints.weights import flatten
from gptjax.config import PUBLISHED, GptOssConfig, ModelConfig, read_config
from gptjax.errors import ConfigError
from gptjax.models import registry
from gptjax.models.params import Params, abstract_params, weights_by_path
from pallas_kernels.formats.mxfp4 import MXFP4, quantize
from tests.convert import made
from tests.oracles import gpt2_ours, gpt_oss_ours, gpt_oss_random
from tests.thinned import thinned, thorough

ROOT = Path(__file__).resolve().parents[2]
GPT2 = {"n_embd": 64, "n_head": 4, "n_inner": 96}  # what MXFP4 can pack: multiples of 32
CHOICES = ("experts", "linear", "all")
KINDS = {  # how the paths end that are packed
    "experts": {"gate_up_kernel", "down_kernel"},
    "linear": {"gate_up_kernel", "down_kernel", "qkv/kernel", "out/kernel", "up/kernel", "down/kernel"},
}
KINDS["all"] = KINDS["linear"] | {"token_embedding", "head_embedding"}


def _is_packed(name: str, targets: str) -> bool:
    return any(name == kind or name.endswith(f"/{kind}") for kind in KINDS[targets])


def _flat(params: Any) -> dict[str, np.ndarray]:
    return {"/".join(path): np.asarray(leaf) for path, leaf in flatten(params).items()}


def _load(directory: Path, dtype: Any = np.float32) -> tuple[registry.Model, Params]:
    model = registry.build(read_config(directory), dtype=dtype)
    return model, api.load_params(open_path(directory), model)


def _expected(params: Any, targets: str) -> dict[str, np.ndarray]:
    """The arrays of params whose weights are rounded here, kernels turned to [..., out, in] first."""
    result: dict[str, np.ndarray] = {}
    for name, array in _flat(params).items():
        if not _is_packed(name, targets):
            result[name] = array
            continue
        packed = quantize(jnp.asarray(array if "embedding" in name else array.swapaxes(-1, -2), jnp.float32))
        result |= {f"{name}/blocks": np.asarray(packed.blocks), f"{name}/scales": np.asarray(packed.scales)}
    return result


def _same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert made.same_bits(found[name], array), name


@pytest.fixture(scope="module")
def gpt_oss() -> gpt_oss_random.Checkpoint:
    return gpt_oss_random.checkpoint()


@pytest.mark.parametrize(("source", "tied"), [(np.float32, True), (made.BFLOAT16, False), thorough(np.float16, True)])
@pytest.mark.parametrize("targets", ["linear", "all"])
def test_gpt2_has_the_chosen_weights_rounded(tmp_path, targets, tied, source):
    raw, tensors = made.gpt2(tmp_path / "src", dtype=source, tie_word_embeddings=tied, **GPT2)
    summary = convert.convert(tmp_path / "src", tmp_path / "dst", quantize=targets)
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    section = config.pop("quantization_config")
    assert config == raw
    assert section == {"quant_method": "mxfp4", "targets": targets}
    model, params = _load(tmp_path / "dst", source)
    assert model.config == dataclasses.replace(read_config(tmp_path / "src"), mxfp4=targets)
    expected = _expected(gpt2_ours.params(tensors, source), targets)
    _same(_flat(params), expected)
    assert summary.num_params == sum(array.size for array in tensors.values())
    assert summary.num_weights == len(expected)
    assert summary.bytes == sum(array.nbytes for array in expected.values())


# Each layout and each choice once; all pairs in make full.
PAIRS = list(itertools.product(CHOICES, gpt_oss_random.LAYOUTS))
assert len(CHOICES) == len(gpt_oss_random.LAYOUTS)


@pytest.mark.parametrize(
    ("targets", "layout"),
    [pair if pair in zip(CHOICES, gpt_oss_random.LAYOUTS, strict=True) else thorough(*pair) for pair in PAIRS],
)
def test_gpt_oss_has_the_chosen_weights_rounded(tmp_path, gpt_oss, targets, layout):
    source = gpt_oss_random.write(tmp_path / "src", gpt_oss, layout=layout, shards=2)
    convert.convert(source, tmp_path / "dst", quantize=targets)
    model, params = _load(tmp_path / "dst")
    assert model.config == dataclasses.replace(read_config(source), mxfp4=targets)
    tensors = gpt_oss.dense if layout == "dequantised" else gpt_oss.packed
    _same(_flat(params), _expected(gpt_oss_ours.params(tensors), targets))


@pytest.mark.parametrize("targets", CHOICES)
def test_experts_that_are_packed_stay_bit_for_bit(tmp_path, gpt_oss, targets):
    source = gpt_oss_random.write(tmp_path / "src", gpt_oss)
    convert.convert(source, tmp_path / "dst", quantize=targets)
    found = _flat(_load(tmp_path / "dst")[1])
    for layer in range(3):
        for theirs, ours in (("gate_up_proj", "gate_up_kernel"), ("down_proj", "down_kernel")):
            for part in ("blocks", "scales"):
                array = gpt_oss.packed[f"model.layers.{layer}.mlp.experts.{theirs}_{part}"]
                assert made.same_bits(found[f"block_{layer}/moe/{ours}/{part}"], array)


def test_experts_rounded_again_are_the_same_numbers(tmp_path, gpt_oss):
    """Dequantised ones, whose numbers MXFP4 has; a block of which no value reaches 4 gets another scale."""
    _, packed = _load(gpt_oss_random.write(tmp_path / "packed", gpt_oss))
    convert.convert(
        gpt_oss_random.write(tmp_path / "dense", gpt_oss, layout="dequantised"), tmp_path / "dst", quantize="experts"
    )
    _, again = _load(tmp_path / "dst")
    for path, leaf in weights_by_path(packed).items():
        if isinstance(leaf, MXFP4):
            np.testing.assert_array_equal(weights_by_path(again)[path].dequantize(), leaf.dequantize())


def test_what_is_packed_already_is_a_plain_conversion(tmp_path, gpt_oss):
    for layout in ("packed", "original"):
        source = gpt_oss_random.write(tmp_path / layout, gpt_oss, layout=layout)
        convert.convert(source, tmp_path / f"{layout}-plain")
        convert.convert(source, tmp_path / f"{layout}-again", quantize="experts")
        plain, again = (tmp_path / f"{layout}-{name}" for name in ("plain", "again"))
        assert (again / "config.json").read_bytes() == (source / "config.json").read_bytes()
        assert read_manifest(again) == read_manifest(plain)


def test_openais_own_config_becomes_hugging_faces(tmp_path, gpt_oss):
    source = gpt_oss_random.write(tmp_path / "src", gpt_oss, layout="original")
    convert.convert(source, tmp_path / "dst", quantize="all")
    raw = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert raw["model_type"] == "gpt_oss"
    assert raw["quantization_config"] == {"quant_method": "mxfp4", "targets": "all"}
    assert read_config(tmp_path / "dst") == dataclasses.replace(read_config(source), mxfp4="all")


def test_the_manifest_has_blocks_and_scales(tmp_path):
    made.gpt2(tmp_path / "src", **GPT2)
    convert.convert(tmp_path / "src", tmp_path / "dst", quantize="all")
    leaves = {"/".join(leaf.path): (leaf.shape, leaf.dtype) for leaf in read_manifest(tmp_path / "dst").leaves}
    assert leaves["block_1/mlp/up/kernel/blocks"] == ((96, 2, 16), "uint8")  # [out, in / 32, 16]
    assert leaves["block_1/mlp/up/kernel/scales"] == ((96, 2), "uint8")
    assert leaves["block_1/mlp/down/kernel/blocks"] == ((64, 3, 16), "uint8")
    assert leaves["block_2/attention/qkv/kernel/scales"] == ((192, 2), "uint8")
    assert leaves["token_embedding/blocks"] == ((101, 2, 16), "uint8")  # [V, D / 32, 16]
    assert leaves["position_embedding"] == ((37, 64), "float32")
    assert leaves["block_0/mlp/up/bias"] == ((96,), "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype_is_for_the_rest(tmp_path, dtype):
    """Weights are rounded from what the source has, not from what the rest is rounded to."""
    _, tensors = made.gpt2(tmp_path / "src", **GPT2)
    convert.convert(tmp_path / "src", tmp_path / "dst", quantize="linear", dtype=dtype)
    expected = _expected(gpt2_ours.params(tensors), "linear")
    for leaf in read_manifest(tmp_path / "dst").leaves:
        assert leaf.dtype == ("uint8" if leaf.path[-1] in ("blocks", "scales") else dtype)
    found = _flat(_load(tmp_path / "dst", np.dtype(dtype))[1])
    _same(found, {name: x if x.dtype == np.uint8 else x.astype(dtype) for name, x in expected.items()})


@pytest.mark.parametrize("kind", ["gpt2", "gpt_oss"])
def test_logits_are_those_of_the_rounded_numbers(tmp_path, gpt_oss, kind):
    if kind == "gpt2":
        made.gpt2(tmp_path / "src", **GPT2)
    else:
        gpt_oss_random.write(tmp_path / "src", gpt_oss, layout="dequantised")
    model, params = _load(tmp_path / "src")
    convert.convert(tmp_path / "src", tmp_path / "dst", quantize="all")
    packed_model, packed_params = _load(tmp_path / "dst")
    packed = weights_by_path(packed_params)

    def numbers(path: Any, leaf: jax.Array) -> jax.Array:
        names = tuple(key.key for key in path)
        if not isinstance(packed[names], MXFP4):
            return leaf
        values = packed[names].dequantize()
        return values if "embedding" in names[-1] else values.swapaxes(-1, -2)

    rounded = jax.tree_util.tree_map_with_path(numbers, params)
    tokens, positions = gpt2_ours.pack([gpt_oss_random.tokens(1, 33)], 33)
    run = gpt2_ours.run if kind == "gpt2" else gpt_oss_ours.run
    with jax.default_matmul_precision("highest"):
        one, other, before = (
            np.asarray(run(m, p, tokens, positions)[0].logits_BTV)
            for m, p in ((packed_model, packed_params), (model, rounded), (model, params))
        )
    # The numbers are the same; products with [in, out] sum in another order than with [out, in].
    atol = 128 * float(jnp.finfo(jnp.float32).eps) * np.abs(other).max()
    np.testing.assert_allclose(one, other, rtol=0, atol=atol)
    assert np.abs(one - before).max() > 100 * atol  # and rounding does change them


@pytest.mark.parametrize("name", thinned(["gpt2-tales", "gpt-oss-tales"]))
def test_a_rounded_demo_tells_a_story(tmp_path, name):
    convert.convert(ROOT / "gptjax" / "demo" / name, tmp_path / "dst", quantize="all")
    with gptjax.load(tmp_path / "dst", dtype="float32", max_length=128) as lm:
        words = lm.generate("Once upon a time there was", max_tokens=24, temperature=0).text.split()
    assert len(set(words)) > 3


def test_gpt2_has_no_experts(tmp_path):
    made.gpt2(tmp_path / "src", **GPT2)
    with pytest.raises(ConfigError, match=r"no experts; choose linear .* or all"):
        convert.convert(tmp_path / "src", tmp_path / "dst", quantize="experts")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


@pytest.mark.parametrize("targets", ["none", "mxfp4=all", ""])
def test_other_choices_are_refused(tmp_path, targets):
    made.gpt2(tmp_path / "src", **GPT2)
    with pytest.raises(ConfigError, match=r"choose one of experts, linear, all"):
        convert.convert(tmp_path / "src", tmp_path / "dst", quantize=targets)


@pytest.mark.parametrize(
    ("changes", "targets", "named"),
    [
        ({"n_inner": 52}, "linear", ["block_0/mlp/down/kernel is [52, 64]", "sum over 52", "block_2/mlp"]),
        ({"n_embd": 60, "n_head": 5}, "all", ["block_0/attention/out/kernel is [60, 60]", "sum over 60", "more"]),
    ],
)
def test_widths_that_blocks_do_not_fit_are_named(tmp_path, changes, targets, named):
    made.gpt2(tmp_path / "src", **{**GPT2, **changes})
    with pytest.raises(ConfigError) as caught:
        convert.convert(tmp_path / "src", tmp_path / "dst", quantize=targets)
    assert all(part in str(caught.value) for part in named)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_the_width_of_all_heads_counts_for_linear_only(tmp_path):
    """10 heads of 10: attention's output sums over 100 numbers."""
    checkpoint = gpt_oss_random.checkpoint(head_dim=10)
    source = gpt_oss_random.write(tmp_path / "src", checkpoint, layout="dequantised")
    convert.convert(source, tmp_path / "dst", quantize="experts")
    with pytest.raises(ConfigError, match=r"attention/out/kernel is \[100, 96\], and its products sum over 100"):
        convert.convert(source, tmp_path / "other", quantize="linear")


def test_rounding_is_not_undone():
    config = dataclasses.replace(_two_layers("gpt-oss-20b"), mxfp4="all")
    with pytest.raises(ConfigError, match=r"already has 'all' in MXFP4, which is more than 'linear'.*cannot be undone"):
        mxfp4.packed_config(config, "linear")
    assert mxfp4.packed_config(config, "all") == config


def _two_layers(name: str) -> ModelConfig:
    """A published size with fewer layers, which are alike."""
    config = dataclasses.replace(PUBLISHED[name], num_layers=2)
    return dataclasses.replace(config, windows=(128, None)) if isinstance(config, GptOssConfig) else config


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_widths_can_be_packed(name):
    """By shapes: 4.25 bits a number, of all but positions, norms, biases, sinks and routers."""
    target = mxfp4.packed_config(_two_layers(name), "all")
    leaves = weights_by_path(abstract_params(registry.build(target)))
    packed = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, MXFP4)}
    assert sum(leaf.nbytes for leaf in packed.values()) * 32 == sum(leaf.size for leaf in packed.values()) * 17
    left = {path[-1] if path[-2:] != ("router", "kernel") else "router" for path in leaves.keys() - packed.keys()}
    assert left <= {"position_embedding", "scale", "bias", "sinks", "router", "gate_up_bias", "down_bias"}


def test_progress_is_told_of_every_byte(tmp_path):
    made.gpt2(tmp_path / "src", **GPT2)
    told = []

    class Bar:
        def __init__(self, description, total):
            told.append(total)

        def __enter__(self):
            return told.append

        def __exit__(self, *_):
            pass

    summary = convert.convert(tmp_path / "src", tmp_path / "dst", dtype="bfloat16", quantize="linear", progress=Bar)
    assert told[0] == summary.bytes == sum(told[1:])


@pytest.mark.parametrize("shape", [(7, 64), (5, 3, 32), (2, 3, 4, 96), (1, 32), (0, 32), (3, 0, 32)])
@pytest.mark.parametrize("most", [1, 64, 200, 10_000])
def test_slices_cover_all_once(shape, most):
    count = np.zeros(shape, int)
    for index in mxfp4.slices(shape, most):
        assert count[index].size <= max(most, shape[-1])
        count[index] += 1
    assert (count == 1).all()


def test_large_weights_are_rounded_in_slices(monkeypatch):
    monkeypatch.setattr(mxfp4, "_SLICE", 320)
    rng = np.random.default_rng(0)
    for path, shape in (
        (("a", "kernel"), (64, 37)),
        (("down_kernel",), (3, 96, 11)),
        (("token_embedding",), (41, 352)),
        (("head_embedding",), (41, 96)),  # parts that end within a slice
    ):
        array = rng.standard_normal(shape, np.float32).astype(made.BFLOAT16)
        turned = array if path[-1].endswith("embedding") else array.swapaxes(-1, -2)
        expected = quantize(jnp.asarray(turned, jnp.float32))
        for parts in ([array], np.array_split(array, 3)) if mxfp4.is_cut(path, shape) else ([array],):
            blocks, scales = mxfp4.rounded(path, parts, turned.shape)
            assert made.same_bits(blocks, np.asarray(expected.blocks))
            assert made.same_bits(scales, np.asarray(expected.scales))


def test_the_command(tmp_path, capsys):
    made.gpt2(tmp_path / "src", **GPT2)
    assert main([str(tmp_path / "src"), str(tmp_path / "dst"), "--quantize", "mxfp4=all", "--dtype", "bfloat16"]) == 0
    assert re.search(r"\d parameters in 53 weights, bfloat16, uint8, ", capsys.readouterr().out)
    assert read_config(tmp_path / "dst").mxfp4 == "all"
    assert main([str(tmp_path / "src"), str(tmp_path / "other"), "--quantize", "mxfp4=experts"]) == 1
    assert "no experts" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["a", "b", "--quantize", "int4"])
    assert "mxfp4=experts" in capsys.readouterr().err
