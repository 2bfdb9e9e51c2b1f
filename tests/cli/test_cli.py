"""The command line, as a person types it."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import gptjax
from gptjax.cli import main
from pallas_kernels import same_bits

ROOT = Path(__file__).resolve().parents[2]


def _run(capsys, *argv: str) -> tuple[int, str, str]:
    status = main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_generate_prints_the_text_and_nothing_else(capsys, lm):
    status, out, err = _run(capsys, "generate", "The king", "--max-tokens", "12", "--dtype", "float32")
    assert (status, out, err) == (0, lm.generate("The king", max_tokens=12).text + "\n", "")


def test_generate_json_is_the_whole_result(capsys, lm):
    argv = [
        "generate",
        "The king",
        "-n",
        "6",
        "--json",
        "-t",
        "0.9",
        "--seed",
        "3",
        "--top-logprobs",
        "2",
        "--dtype",
        "float32",
    ]
    status, out, err = _run(capsys, *argv)
    result = json.loads(out)
    completion = lm.generate("The king", max_tokens=6, temperature=0.9, seed=3, top_logprobs=2)
    assert (status, err) == (0, "")
    assert result["prompt"] == "The king"
    assert result["text"] == completion.text
    assert tuple(result["token_ids"]) == completion.token_ids
    assert result["usage"] == {"prompt_tokens": 2, "completion_tokens": 6}
    assert len(result["top_logprobs"]) == 6


@pytest.mark.parametrize("argv", [["generate", "-n", "3"], ["generate", "-", "-n", "3"]])
def test_a_prompt_from_standard_input(capsys, monkeypatch, lm, argv):
    monkeypatch.setattr(sys, "stdin", io.StringIO("The king\n"))
    assert _run(capsys, *argv)[:2] == (0, lm.generate("The king", max_tokens=3).text + "\n")


def test_echo_prints_the_prompt_first(capsys, lm):
    _, out, _ = _run(capsys, "generate", "The king", "-n", "5", "--echo")
    assert out == "The king" + lm.generate("The king", max_tokens=5).text + "\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["perplexity", "--file", "x"], "unrecognized arguments: --file\n"),
        (["generate", "A", "--maxtokens=3"], "unrecognized arguments: --maxtokens=3 (did you mean --max-tokens?)\n"),
        (
            ["serve", "--prefil-chunk", "64"],
            "unrecognized arguments: --prefil-chunk 64 (did you mean --prefill-chunk?)\n",
        ),
        (["convert", "a", "b", "c"], "unrecognized arguments: c\n"),
    ],
)
def test_an_option_that_there_is_not_is_told_with_the_commands_own(capsys, argv, says):
    with pytest.raises(SystemExit) as status:
        main(argv)
    assert status.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"usage: gptjax {argv[0]} ")
    assert err.endswith(f"gptjax {argv[0]}: error: {says}")


def test_stats_go_to_standard_error(capsys):
    status, out, err = _run(capsys, "generate", "A", "-n", "4", "--stats")
    assert status == 0
    assert re.search(r"\d tokens/s", err)
    assert "tokens/s" not in out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["generate", "A", "--model", "/no/such/place"], "/no/such/place"),
        (["generate", "A", "--temperature", "-1"], "--temperature must be"),
        (["generate", "A", "--max-length", "513"], "512 positions"),
        (["generate", "A", "--dtype", "int4"], "bfloat16"),
        (["generate", ""], "empty"),
        (["generate", "word " * 600], "512"),
        (["info", "gpt2-tails"], "gpt2-tales"),
        (["info", "--max-batch", "0"], "--max-batch must be"),
        (["info", "--max-batch", "-5"], "--max-batch must be"),
    ],
)
def test_an_error_is_one_message_and_status_1(capsys, argv, says):
    status, out, err = _run(capsys, *argv)
    assert (status, out) == (1, "")
    assert err.startswith("gptjax: ")
    assert says in err
    assert "Traceback" not in err


def test_a_cache_in_fp8_is_told_by_info_and_takes_half(capsys):
    command = ["info", "--size", "gpt-oss-20b", "--memory", "141", "--max-length", "1024", "--json"]
    plain, packed = (json.loads(_run(capsys, *command, *more)[1]) for more in ([], ["--cache-dtype", "fp8"]))
    assert (plain.get("cache_dtype"), packed["cache_dtype"]) == (None, "fp8")
    assert packed["cache_bytes"] == pytest.approx(plain["cache_bytes"] * 65 / 128, rel=0.01)


@pytest.mark.parametrize(
    "argv", [["generate", "A", "--temprature", "1"], ["nonsense"], ["generate", "A", "-n", "many"]]
)
def test_wrong_usage_is_status_2(capsys, argv):
    with pytest.raises(SystemExit) as raised:
        main(argv)
    assert raised.value.code == 2
    assert "usage: gptjax" in capsys.readouterr().err


def test_without_a_command_the_help_is_shown(capsys):
    status, out, _ = _run(capsys)
    assert status == 2
    assert all(command in out for command in ("generate", "info", "convert"))


@pytest.mark.parametrize("command", ["generate", "info", "doctor", "convert"])
def test_each_command_has_help_with_examples(capsys, command):
    with pytest.raises(SystemExit) as raised:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert raised.value.code == 0
    assert "examples:" in out
    assert f"gptjax {command}" in out


def test_the_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"gptjax {gptjax.__version__}\n"


def test_info_tells_parameters_and_memory(capsys):
    status, out, _ = _run(capsys, "info", "gpt2-tales", "--json", "--tensors", "--dtype", "float32", "--max-batch", "2")
    facts = json.loads(out)
    assert status == 0
    # By hand: V·D + S·D + L·(12·D² + 13·D) + 2·D with V 8192, S 512, D 256, L 6.
    parameters = 8192 * 256 + 512 * 256 + 6 * (12 * 256**2 + 13 * 256) + 2 * 256
    assert facts["parameters"] == parameters
    assert facts["weights_bytes"] == 4 * parameters
    # Keys and values: 2 rows × 512 positions, a page of nobody and perhaps one to copy into × 6 layers × 2 × 256
    # float32; for each row, the numbers of 4 pages, and a length.
    copies = jax.default_backend() == "cpu" and same_bits.holds()  # prompts may end inside a page that is copied
    pages = 2 * 4 + (2 if copies else 1)
    assert facts["cache_bytes"] == pages * 128 * 6 * 2 * 256 * 4 + 2 * (4 + 1) * 4
    assert facts["cache_tokens"] == 2 * 512
    running = facts["cache_bytes"] + facts["logits_bytes"] + facts["activations_bytes"]
    assert facts["needed_bytes"] == facts["weights_bytes"] + max(facts["loading_bytes"], running)
    assert facts["available_bytes"] > 0
    assert facts["fits"] == "yes"
    assert facts["tensors"]["block_0/attention/qkv/kernel"] == "[256, 768] bfloat16"
    assert len(facts["tensors"]) == 4 + 6 * 12


def test_info_says_whether_the_weights_can_be_used(capsys, demo, tmp_path):
    assert "76 arrays, stored as bfloat16" in json.loads(_run(capsys, "info", "--json")[1])["weights"]
    broken = tmp_path / "broken"
    shutil.copytree(demo, broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    status, out, _ = _run(capsys, "info", str(broken), "--json")
    assert status == 1
    assert "cannot be used" in json.loads(out)["weights"]
    assert _run(capsys, "info", str(broken), "--tensors")[0] == 1
    assert _run(capsys, "convert", str(demo), str(tmp_path / "converted"), "--dtype", "float16")[0] == 0
    assert "stored as float16" in json.loads(_run(capsys, "info", str(tmp_path / "converted"), "--json")[1])["weights"]


def test_info_for_people(capsys):
    status, out, _ = _run(capsys, "info")
    assert status == 0
    assert re.search(r"^architecture +GPT2$", out, re.M)
    assert re.search(r"^weights +27\.\d\d MB$", out, re.M)


def test_a_closed_pipe_is_no_traceback():
    command = f"{sys.executable} -m gptjax generate 'The king' -n 200 | head -c 5"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert len(result.stdout) == 5
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr


def test_control_c_ends_with_130_and_no_traceback():
    code = (
        "import gptjax.api, sys\n"
        "def load(*_, **__): raise KeyboardInterrupt\n"
        "gptjax.api.load = load\n"
        "from gptjax.cli import main\n"
        "sys.exit(main(['generate', 'A']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 130
    assert result.stderr.strip() == ""


def test_an_empty_name_is_not_the_default(capsys):
    """As of a shell's unset variable."""
    for command in (["generate", "A", "-m", ""], ["info", ""], ["perplexity", ""]):
        assert main(command) == 1, command
        assert "the checkpoint's name is empty" in capsys.readouterr().err
