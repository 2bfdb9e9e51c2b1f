"""`python -m convert`, as a person types it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from convert.__main__ import main
from gptjax.cli import main as gptjax_main
from tests.convert import made
from tests.oracles import gpt_oss_random

ROOT = Path(__file__).resolve().parents[2]


def _run(capsys, *argv: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_converts_and_says_so(tmp_path, capsys):
    made.gpt2(tmp_path / "src")
    status, out, err = _run(capsys, tmp_path / "src", tmp_path / "dst")
    assert (status, err) == (0, "")
    line = r"{}: 72,096 parameters in 40 weights, float32, 0\.3 MB, \d+\.\d s\n"
    assert re.fullmatch(line.format(re.escape(str(tmp_path / "dst"))), out)


def test_dtype_and_overwrite(tmp_path, capsys):
    made.gpt2(tmp_path / "src")
    assert _run(capsys, tmp_path / "src", tmp_path / "dst")[0] == 0
    status, out, err = _run(capsys, tmp_path / "src", tmp_path / "dst")
    assert (status, out) == (1, "")
    assert "dst exists; name another directory" in err and "--overwrite" in err
    status, out, err = _run(capsys, tmp_path / "src", tmp_path / "dst", "--overwrite", "--dtype", "bfloat16")
    assert (status, err) == (0, "")
    assert "bfloat16" in out


def test_a_demo_by_its_name(tmp_path, capsys):
    status, out, _ = _run(capsys, "gpt2-tales", tmp_path / "dst")
    assert status == 0 and "6,967,296 parameters in 76 weights, bfloat16" in out


def test_errors_are_one_message_and_exit_1(tmp_path):
    command = [sys.executable, "-m", "convert", str(tmp_path / "no/such/dir"), str(tmp_path / "dst")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("python -m convert: ") and "no/such/dir" in result.stderr
    assert "Traceback" not in result.stderr
    assert os.listdir(tmp_path) == []


def test_all_faults_of_a_checkpoint_reach_the_person(tmp_path, capsys):
    _, tensors = made.gpt2(tmp_path / "src")
    del tensors["wpe.weight"]
    made.write_gpt2(tmp_path / "src", tensors | {"odd": tensors["ln_f.bias"]})
    status, out, err = _run(capsys, tmp_path / "src", tmp_path / "dst")
    assert (status, out) == (1, "")
    assert f"{tmp_path / 'src'} cannot be used" in err and "wpe.weight" in err and "odd" in err
    assert os.listdir(tmp_path) == ["src"]


@pytest.mark.parametrize("argv", [[], ["one"], ["a", "b", "c"], ["a", "b", "--dtype", "int8"], ["a", "b", "--quick"]])
def test_wrong_usage_exits_2(capsys, argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: python -m convert" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "name a SOURCE and a DESTINATION, or --verify DIRECTORY"),
        (["a", "--to", "hf"], "name a SOURCE and a DESTINATION"),
        (["--verify", "a", "b"], "it takes no SOURCE"),
        (["--verify", "a", "--to", "hf", "--dtype", "float32"], "it takes no --to, --dtype"),
        (
            ["--verify", "a", "--quantize", "mxfp4", "--overwrite", "--ignore-config", "x", "--max-shard-size", "1"],
            "it takes no --quantize, --max-shard-size, --ignore-config, --overwrite",
        ),
        (["a", "b", "--max-shard-size", "1GB"], "--max-shard-size is for --to hf"),
        (["a", "b", "--to", "gguf"], "invalid choice: 'gguf'"),
        (["a", "b", "--quantize", "int8"], "invalid choice: 'int8'"),
        (["a", "b", "--to", "hf", "--max-shard-size", "5TB"], "'5TB' is not a size such as 500MB or 5GB"),
        (["a", "b", "--to", "hf", "--max-shard-size", "0"], "'0' is not a size"),
        (["a", "b", "--to", "hf", "--max-shard-size", "-1"], "--max-shard-size"),
        (["a", "b", "--to", "hf", "--max-shard-size", "9" * 5000], "is not a size"),
    ],
)
@pytest.mark.parametrize("command", [main, lambda argv: gptjax_main(["convert", *argv])])
def test_wrong_combinations_are_named(tmp_path, capsys, monkeypatch, command, argv, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        command(argv)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("size", "files"), [("100KB", 3), ("100000", 3), ("100kb", 3), ("1MB", 1), ("5GB", 1)])
def test_exports_and_says_so(tmp_path, capsys, size, files):
    made.gpt2(tmp_path / "src")
    status, out, err = _run(capsys, tmp_path / "src", tmp_path / "dst", "--to", "hf", "--max-shard-size", size)
    assert (status, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'dst'}: 72,096 parameters in 40 weights, float32, 0.3 MB, ")
    assert len(list((tmp_path / "dst").glob("*.safetensors"))) == files


@pytest.mark.parametrize("spelling", ["mxfp4", "mxfp4=experts"])
def test_packs_the_experts_of_a_float_gpt_oss(tmp_path, capsys, spelling):
    source = gpt_oss_random.write(tmp_path / "src", gpt_oss_random.checkpoint(), layout="dequantised")
    status, out, _ = _run(capsys, source, tmp_path / "dst", "--to", "hf", "--quantize", spelling)
    assert status == 0 and "float32, uint8" in out
    assert json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"]["quant_method"] == "mxfp4"
    status, out, _ = _run(capsys, source, tmp_path / "converted", "--quantize", spelling)
    assert status == 0 and "float32, uint8" in out


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "examples:\n  python -m convert ~/models/gpt2 " in out
    assert "--dtype {float32,bfloat16,float16}" in out and "--overwrite" in out


def test_interrupted_conversions_say_so(tmp_path, capsys, monkeypatch):
    made.gpt2(tmp_path / "src")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gptjax.checkpoints.saving.write_manifest", interrupt)
    status, out, err = _run(capsys, tmp_path / "src", tmp_path / "dst")
    assert (status, out) == (130, "") and "interrupted" in err
    assert os.listdir(tmp_path) == ["src"]
