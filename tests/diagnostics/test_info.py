"""What `gptjax info` tells of weights in MXFP4."""

import json
import re

import pytest

import convert
from gptjax.cli import main
from gptjax.diagnostics.cards import CARDS
from gptjax.diagnostics.info import describe, describe_published, imagined_gpu
from tests.gguf import made
from tests.oracles import gguf_from_hf, llama_random

# By hand: in GPT2-tales, V 8192, D 256, L 6, F 1024; in GPT-OSS-tales, L 6, E 8, D 256, F 192.
GPT2_LINEAR = 6 * 12 * 256**2
GPT2_ALL = GPT2_LINEAR + 8192 * 256
GPT2_REST = 512 * 256 + 6 * 13 * 256 + 2 * 256
GPT_OSS_EXPERTS = 6 * 8 * 3 * 256 * 192


def test_a_checkpoint_without(demo):
    assert not [key for key in describe(demo) if "packed" in key or "float16" in key]


def test_experts(capsys):
    facts = describe("gpt-oss-tales")
    assert facts["packed_numbers"] == GPT_OSS_EXPERTS
    assert facts["packed_bytes"] == GPT_OSS_EXPERTS * 17 // 32
    assert facts["packed_vs_float16"] == round(16 / 4.25, 4) == 3.7647
    rest = facts["parameters"] - GPT_OSS_EXPERTS  # in bfloat16, of float16's size
    assert facts["whole_vs_float16"] == round(2 * facts["parameters"] / (2 * rest + facts["packed_bytes"]), 4)
    assert main(["info", "gpt-oss-tales"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^packed_vs_float16 +3\.7647$", out, re.M)
    assert re.search(r"^packed +3\.76 MB$", out, re.M)


@pytest.mark.parametrize(("targets", "numbers"), [("linear", GPT2_LINEAR), ("all", GPT2_ALL)])
@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_converted(demo, tmp_path, targets, numbers, dtype, size):
    convert.convert(demo, tmp_path / "dst", quantize=targets, dtype=dtype)
    facts = json.loads(json.dumps(describe(tmp_path / "dst")))
    parameters = GPT2_ALL + GPT2_REST
    assert facts["packed_numbers"] == numbers
    assert facts["packed_vs_float16"] == 3.7647
    stored = numbers * 17 // 32 + (parameters - numbers) * size
    assert facts["whole_vs_float16"] == round(2 * parameters / stored, 4)
    assert facts["mxfp4"] == targets


def test_packed_types_of_a_gguf_file(tmp_path, capsys):
    """By hand: the queries' and keys' rows of 96 numbers in blocks of 32 and 34 bytes, all others as they are."""
    model = llama_random.checkpoint(3, **llama_random.VARIANTS["llama2"])  # D 96, six heads of 16 and as many of keys
    types = {f"attn_{part}.weight": gguf_from_hf.Q8_0 for part in "qkv"}
    path = gguf_from_hf.write(tmp_path / "model.gguf", *model, types)
    numbers, layers = 3 * 96 * 96, model.config["num_hidden_layers"]
    rest = sum(x.size for x in model.tensors.values()) - layers * numbers
    kept, expanded = layers * numbers // 32 * 34, layers * numbers * 4
    facts = describe(path, dtype="float32")
    assert facts["weights_kept_bytes"] == 4 * rest + kept
    assert facts["weights_expanded_bytes"] == 4 * rest + expanded == facts["weights_bytes"]  # on a CPU, with room
    for name, size in (("keep", facts["weights_kept_bytes"]), ("expand", facts["weights_expanded_bytes"])):
        assert main(["info", str(path), "--dtype", "float32", "--packed", name, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["weights_bytes"] == size
    gpu = imagined_gpu(1e9)
    assert describe(path, dtype="float32", device=gpu)["weights_bytes"] == facts["weights_kept_bytes"]


def test_weights_that_cannot_be_used(demo, tmp_path):
    """The packed part follows from the config; the whole is not known."""
    convert.convert(demo, tmp_path / "dst", quantize="all")
    manifest = tmp_path / "dst" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("final_norm/scale", "final_norm/other"))
    facts = describe(tmp_path / "dst")
    assert "cannot be used" in facts["weights"]
    assert facts["packed_numbers"] == GPT2_ALL
    assert "whole_vs_float16" not in facts


@pytest.mark.parametrize(("size", "gigabytes", "length"), [("gpt-oss-120b", 80, 65536), ("gpt-oss-20b", 20, 8192)])
def test_the_published_sizes_fit_the_cards_they_are_meant_for(size, gigabytes, length):
    """120b with half of its 131,072 positions on a card of 80 GB; 20b with a prompt of 8,192 in 20 GB."""
    facts = describe_published(size, max_length=length, device=imagined_gpu(gigabytes * 1e9))
    assert facts["fits"] == "yes", facts
    assert facts["needed_bytes"] > 0.75 * gigabytes * 1e9
    assert describe_published(size, device=imagined_gpu(13e9))["fits"].startswith("no; try ")


def test_the_command_tells_of_a_size(capsys):
    assert main(["info", "--size", "gpt-oss-20b", "--memory", "24", "--max-length", "4096"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^parameters +20914757184$", out, re.MULTILINE)
    assert re.search(r"^device +GPU of 24.00 GB$", out, re.MULTILINE)
    for options, says in (
        (["--size", "gpt-3"], "unknown size 'gpt-3'; choose one of gpt2"),
        (["--size", "gpt2", "--tensors"], "--size describes no checkpoint"),
        (["--size", "gpt2", "--memory", "-1"], "more than 0 bytes"),
        (["--size", "gpt2", "--memory", "nan"], "more than 0 bytes"),
        (["--size", "gpt2", "--device", "h100"], "unknown device 'h100'; choose one of a100-40gb, a100-80gb, h100-80"),
    ):
        assert main(["info", *options]) == 1
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mesh", "rows", "weights", "cache"),
    [
        # 8,030,261,248 parameters, of which one embedding of V 128,256 · D 4096 is looked up only. A layer's keys and
        # values are 2 · 8 · 128 numbers a position. Two norms of D in each of the 32 layers and one more are divided
        # among no devices.
        ([], 8, 8_030_261_248 - 128_256 * 4096, 8 * 1024 * 32 * 2048),
        (["--mesh", "tensor=2"], 8, (8_030_261_248 - 128_256 * 4096 + 65 * 4096) // 2, 8 * 1024 * 32 * 1024),
        (["--mesh", "data=4,tensor=2"], 10, (8_030_261_248 - 128_256 * 4096 + 65 * 4096) // 2, 3 * 1024 * 32 * 1024),
    ],
)
def test_how_fast_a_card_could_decode(mesh, rows, weights, cache, capsys):
    """What a device reads in a step, by hand, at the 3.35 TB/s of an H100."""
    command = ["info", "--size", "llama-3.1-8b", "--device", "h100-80gb", "--max-length", "1024"]
    assert main([*command, "--max-batch", str(rows), *mesh, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["device"], facts["available_bytes"], facts["step_positions"]) == ("h100-80gb", 80e9, 1024)
    assert (facts["step_weights_bytes"], facts["step_cache_bytes"]) == (2 * weights, 2 * cache)
    seconds = 2 * (weights + cache) / 3.35e12
    assert facts["step_ms_at_least"] == round(1e3 * seconds, 3)
    assert facts["tokens_per_second_at_most"] == round(rows / seconds)


def test_many_rows_are_bound_by_arithmetic_and_by_what_the_cache_holds():
    """By hand, for GPT-2 XL: docs/precision-and-cost.md has what a token takes apart from attention."""
    asked = {"max_batch": 1024, "card": CARDS["a100-40gb"], "device": imagined_gpu(40e9)}
    facts = describe_published("gpt2-xl", max_length=8, **asked)
    flops = 1024 * (2_949_120_000 + 160_822_400 + 4 * 48 * 1600 * 8)
    assert facts["step_gigaflops"] == round(flops / 1e9, 3)
    assert facts["step_ms_at_least"] == round(1e3 * flops / 312e12, 3)
    facts = describe_published("gpt2-xl", **asked | {"max_batch": 512})
    assert facts["step_positions"] == facts["cache_tokens"] // 512 < 1024


def test_the_metadata_of_a_gguf_file(tmp_path, capsys):
    """JSON keeps numbers, flags and texts as they are; people see texts quoted and lists counted."""
    model = llama_random.checkpoint(3, **llama_random.VARIANTS["llama2"])
    more = {
        "general.name": made.string("Über 5"),
        "general.tags": made.array(made.STRING, ["a", "b"]),
        "tokenizer.ggml.scores": made.array(made.F32, [0.5] * 9),
        "general.odd": made.number(made.F32, float("inf")),
        "tokenizer.ggml.add_bos_token": made.number(made.BOOL, True),
    }
    path = gguf_from_hf.write(tmp_path / "model.gguf", *model, metadata=more)
    assert main(["info", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["metadata"]
    assert found["general.architecture"] == "llama"
    assert found["llama.block_count"] == model.config["num_hidden_layers"]
    assert found["general.name"] == "Über 5"
    assert found["general.tags"] == ["a", "b"]
    assert found["tokenizer.ggml.scores"] == {"length": 9}
    assert found["general.odd"] == "inf"
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert main(["info", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "general.name  'Über 5'\n" in shown
    assert "tokenizer.ggml.scores  9 values\n" in shown
    assert re.search(rf"^windows +None in all {model.config['num_hidden_layers']} layers$", shown, re.MULTILINE)
