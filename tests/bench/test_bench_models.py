"""Costs against counts by hand, and what a measurement does and does not include."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import gptjax
from gptjax.bench import models
from gptjax.bench.ceilings import measure_memory
from gptjax.bench.figure import Figure
from gptjax.bench.loading import measure_loading
from gptjax.checkpoints.weights import flatten
from gptjax.cli import main
from gptjax.config import PUBLISHED, read_config
from gptjax.engine import cost
from gptjax.models import registry
from gptjax.models.packing import quantized
from gptjax.models.params import abstract_params, random_params, weights_by_path
from pallas_kernels.formats import is_packed
from pallas_kernels.formats.ggml.weight import Quantized
from pallas_kernels.formats.mxfp4 import MXFP4
from tests.compilations import compilations


@pytest.mark.parametrize(
    ("name", "layers", "width", "parameters"),
    [("gpt2", 12, 768, 124_439_808), ("gpt2-xl", 48, 1600, 1_557_611_200)],
)
@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_and_flops_are_those_counted_by_hand(name, layers, width, parameters, dtype, itemsize):
    model = registry.build(PUBLISHED[name], dtype=dtype)
    # Every weight once, but of wpe's 1024 rows none to speak of.
    weights = itemsize * (parameters - 1024 * width)
    assert cost.weight_bytes_per_step(model) == weights
    # A key and a value of the whole width in each layer.
    position = 2 * layers * width * itemsize
    assert cost.cache_bytes(model, length=512) == 512 * position
    assert cost.decode_bytes(model, batch=8, length=512) == weights + 8 * 512 * position
    # Per layer: qkv D·3D, out D·D, up D·4D, down 4D·D, two operations a weight; scores and values 2·D each a position.
    flops = layers * (2 * 12 * width**2 + 4 * width * 512) + 2 * 50257 * width
    assert cost.token_flops(model, length=512) == flops
    assert cost.token_flops(model, length=512, logits=False) == flops - 2 * 50257 * width


def test_bytes_of_keys_and_values_in_float8_are_those_counted_by_hand():
    """64 numbers of a byte and one more for their scale, of a key and a value of each of eight heads."""
    model = registry.build(PUBLISHED["gpt-oss-20b"], dtype="bfloat16", cache_dtype="fp8")
    assert cost.cache_bytes(model, length=32768) == 12 * (32768 + 128) * 2 * 8 * 65


def test_bytes_and_flops_of_gpt_oss_are_those_counted_by_hand():
    """The bytes of a token are those of docs/PERFORMANCE.md: 3.71 GB of 20b's weights and 5.00 GB of 120b's."""
    for name, layers, experts, gigabytes in (("gpt-oss-20b", 24, 32, 3.71), ("gpt-oss-120b", 36, 128, 5.00)):
        model = registry.build(PUBLISHED[name], dtype="bfloat16")
        assert cost.weight_bytes_per_step(model) / 1e9 == pytest.approx(gigabytes, rel=0.01)
        # Two of eight key/value heads' 64 numbers of two bytes; half of the layers see 128 positions at most.
        position = 2 * 8 * 64 * 2
        assert cost.cache_bytes(model, length=2048) == layers // 2 * (2048 + 128) * position
        assert cost.cache_bytes(model, length=100) == layers * 100 * position
        expert = (2 * 2880 * 2880 + 2880 * 2880) * 17 // 32 + 3 * 2880 * 2  # 17 bytes for 32 values, and the biases
        one, most = (cost.weight_bytes_per_step(model, batch=batch) for batch in (1, 10**4))
        assert most - one == layers * (experts - 4) * expert  # so many rows leave none out
    flops = cost.token_flops(registry.build(PUBLISHED["gpt-oss-20b"]), length=1)
    assert flops / 1e9 == pytest.approx(7.2, rel=0.02)  # as PERFORMANCE.md has it


@pytest.mark.parametrize(("name", "experts"), [("gpt-oss-20b", 32), ("gpt-oss-120b", 128)])
@pytest.mark.parametrize("rows", [1, 2, 8, 32, 128])
def test_the_experts_that_are_read_are_those_that_random_rows_choose(name, experts, rows):
    rng = np.random.default_rng(rows)
    chosen = [len(np.unique(rng.random((rows, experts)).argsort(axis=1)[:, :4])) for _ in range(2000)]
    model = registry.build(PUBLISHED[name], dtype="bfloat16")
    one, these, most = (cost.weight_bytes_per_step(model, batch=batch) for batch in (1, rows, 10**4))
    found = 4 + (these - one) / (most - one) * (experts - 4)
    assert found == pytest.approx(np.mean(chosen), abs=4 * np.std(chosen) / 2000**0.5 + 1e-3)


def test_an_untied_embedding_is_only_looked_up():
    tied = registry.build(PUBLISHED["gpt2"])
    untied = registry.build(dataclasses.replace(PUBLISHED["gpt2"], tied_head=False))
    assert cost.weight_bytes_per_step(untied) == cost.weight_bytes_per_step(tied)


def test_loading_is_timed_and_its_host_memory_is_told():
    held = []
    loaded, loading = measure_loading(lambda: held.append(bytearray(50 << 20)) or 7)
    assert loaded == 7
    assert loading.seconds > 0
    assert 45 << 20 < loading.host_bytes < 80 << 20


@pytest.mark.thorough
def test_random_checkpoints_are_read_as_what_they_are(tmp_path, capsys, monkeypatch):
    """A small "published" size, in several shards; every tensor of it is one that the loader wants."""
    small = dataclasses.replace(
        PUBLISHED["gpt-oss-20b"], width=64, mlp_width=32, num_layers=2, windows=(128, None), vocab_size=300
    )
    monkeypatch.setattr("gptjax.config.sizes.PUBLISHED", {"small": small})
    monkeypatch.setattr("convert.random.SHARD_BYTES", 200_000)
    target = tmp_path / "written"
    assert main(["bench", "--random", "small", "--write-random", str(target)]) == 0
    assert "random weights of small" in capsys.readouterr().out
    assert len(list(target.glob("model-*.safetensors"))) > 1
    assert read_config(target) == small
    with gptjax.load(target, max_length=64) as lm:
        weights = {"/".join(path): np.asarray(leaf, np.float32) for path, leaf in flatten(lm.params).items()}
        assert all(0 < np.abs(weight).max() < np.inf for weight in weights.values())
        assert np.isfinite(lm.logits([1, 2, 3])).all()
    assert main(["bench", "--random", "small", "--write-random", str(target)]) == 1
    assert "exists; name another directory" in capsys.readouterr().err


def test_figures_say_when_they_are_noise():
    assert (Figure((1.0, 1.02, 1.05)).median, Figure((1.0, 1.02, 1.05)).noisy) == (1.02, False)
    assert Figure((1.0, 1.0, 1.2)).noisy
    assert Figure((1.0, 1.0, 1.2)).spread == pytest.approx(0.2)


def test_first_calls_and_compilation_are_not_measured(lm):
    calls = []

    def turn():
        calls.append(len(calls))
        return (100.0, 100.0) if len(calls) == 1 else (2.0, float(len(calls)))

    (result,) = models.run([("gptjax", turn)], lm.model, batch=2, prompt_length=8, steps=4, repeats=3)
    assert len(calls) == 4
    assert result.prefill.seconds == (2.0, 2.0, 2.0)
    assert result.step.seconds == (2.0, 3.0, 4.0)
    assert result.prefill_tokens_per_second == 2 * 8 / 2.0
    assert result.decode_tokens_per_second == 2 / 3.0
    assert result.share(result.bytes_per_step / 3.0) == 1


def test_compilation_is_told_from_running():
    fresh = jax.jit(lambda x: x * 2.25)
    assert models._compile_seconds(lambda: fresh(1.0)) > 0
    assert models._compile_seconds(lambda: fresh(2.0)) == 0


def test_nothing_is_compiled_in_a_measured_turn(lm):
    turn = models.ours(lm.model, lm.params, batch=2, prompt_length=20, steps=3)
    turn()
    with compilations() as compiled:
        prefill, step = turn()
    assert compiled == []
    assert prefill > 0
    assert step > 0


def test_a_prompt_beyond_the_context_is_refused(lm):
    with pytest.raises(gptjax.CapacityError, match="512"):
        models.ours(lm.model, lm.params, batch=1, prompt_length=500, steps=12)


@pytest.mark.thorough  # in tests/models/test_packed_gguf.py, too
def test_random_weights_have_the_declared_shapes_and_dtypes():
    model = registry.build(gptjax.load("gpt2-tales").config, dtype="bfloat16")
    params = random_params(model)
    declared = abstract_params(model)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), declared)
    assert all(float(abs(leaf).max()) > 0 for leaf in jax.tree.leaves(params))


def test_the_ceiling_is_the_faster_of_copying_and_reading():
    speed = measure_memory(3)
    assert 1e8 < speed.read < 1e13 and 1e8 < speed.copy < 1e13
    assert speed.bytes_per_second == max(speed.read, speed.copy)


@pytest.mark.thorough
def test_random_weights_in_a_type(capsys, monkeypatch):
    """All matrices but experts are packed; a step reads fewer bytes, and experts stay in MXFP4."""
    small = dataclasses.replace(
        PUBLISHED["gpt-oss-20b"], width=64, mlp_width=32, num_layers=1, windows=(None,), vocab_size=300
    )
    monkeypatch.setattr("gptjax.config.sizes.PUBLISHED", {"small": small})
    read = {}
    for kind in (None, "Q8_0", "mxfp4"):
        more = [] if kind is None else ["--quantize", kind]
        argv = ["--random", "small", *more, "--prompt-length", "4", "--steps", "1", "--repeats", "1", "--json"]
        assert main(["bench", *argv]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["model"] == f"small (random weights{f' in {kind}' if kind else ''})"
        read[kind] = facts["results"][0]["bytes_per_step"]
    assert read[None] > read["Q8_0"] > read["mxfp4"]
    config = quantized(small, weights_by_path(abstract_params(registry.build(small))), "Q8_0")
    leaves = weights_by_path(abstract_params(registry.build(config)))
    types = {path[-2:]: type(leaf) for path, leaf in leaves.items() if is_packed(leaf)}
    assert types.pop(("moe", "gate_up_kernel")) is types.pop(("moe", "down_kernel")) is MXFP4
    assert set(types.values()) == {Quantized} and len(types) == 4


@pytest.mark.thorough  # that it prints: the test below
def test_each_size_is_printed_once_it_is_measured(capsys, monkeypatch):
    """What was measured is not lost if a later size does not fit, or is interrupted."""
    measure = models.run

    def run(turns, model, *, batch, **sizes):
        if batch == 2:
            raise KeyboardInterrupt
        return measure(turns, model, batch=batch, **sizes)

    monkeypatch.setattr(models, "run", run)
    assert main(["bench", "gpt2-tales", "--batch", "1", "2", "--prompt-length", "8", "--steps", "2", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in lines if line.startswith("gptjax ")] == [["gptjax", "1", "8"]]


def test_the_command_prints_a_table_and_json(capsys):
    short = ["--steps", "4", "--repeats", "2", "--prompt-length", "8"]
    assert main(["bench", "gpt2-tales", "--batch", "1", "2", *short]) == 0
    out = capsys.readouterr().out
    assert out.count("\ngptjax ") == 2
    assert main(["bench", *short, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    (result,) = facts["results"]
    assert facts["ceiling_bytes_per_second"] == max(facts["read_bytes_per_second"], facts["copy_bytes_per_second"])
    speed = result["bytes_per_step"] / result["step_seconds"]
    assert result["share_of_ceiling"] == pytest.approx(speed / facts["ceiling_bytes_per_second"])
    assert result["peak_memory"] > 10_000_000
    assert result["compile"] >= 0
    assert result["decode_tokens_per_second"] == pytest.approx(1 / result["step_seconds"])
    assert len(result["step"]["seconds"]) == 2


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["gpt2-tales", "--random", "gpt2"], "not both"),
        (["--batch", "100000000"], "try max_batch="),
        (["--random", "gpt2-xl", "--batch", "100000"], "try max_batch="),
        (["--random", "gpt5"], "gpt2-xl"),
        (["--batch", "0"], "--batch"),
        (["--prompt-length", "512"], "positions"),
    ],
)
def test_bad_arguments_name_the_fix(capsys, argv, says):
    assert main(["bench", "--steps", "2", "--repeats", "1", *argv]) == 1
    assert says in capsys.readouterr().err
