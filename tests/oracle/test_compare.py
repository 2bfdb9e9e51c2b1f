"""`gptjax compare` against transformers: all stages agree, and a planted bug is found where it is."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import gptjax.layers.attention  # noqa: E402
import gptjax.layers.mlp  # noqa: E402
import gptjax.models.gpt2  # noqa: E402
from gptjax.api import load  # noqa: E402
from gptjax.checkpoints import hub  # noqa: E402
from gptjax.cli import main  # noqa: E402
from gptjax.diagnostics import transformers_comparison  # noqa: E402
from gptjax.layers.norm import Normed  # noqa: E402
from gptjax.layers.observe import observe  # noqa: E402
from gptjax.layers.residual import Residual  # noqa: E402
from gptjax.models import build  # noqa: E402
from gptjax.models.stages import _forward, stages  # noqa: E402
from tests.oracles import gguf_from_hf, llama_random  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]  # torch's and transformers' own warnings
IDS = list(range(3, 40))


@pytest.fixture
def fresh():
    """Compiled programs are kept by model, and a planted bug does not change the model's name."""
    _forward.clear_cache()
    yield
    _forward.clear_cache()


def _first_difference(directory, dtype="float32"):
    lm = load(directory, dtype=dtype)
    rows = transformers_comparison.compare(lm.model, lm.params, hub.resolve(directory), IDS)
    assert [row.stage for row in rows] == stages(lm.config)
    first = transformers_comparison.first_difference(rows)
    return None if first is None else first.stage


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_demo_agrees_at_every_stage(dtype):
    assert _first_difference("gpt2-tales", dtype) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gpt_oss_demo_agrees_at_every_stage(dtype):
    assert _first_difference("gpt-oss-tales", dtype) is None


def test_a_wrong_window_is_named_where_it_is(monkeypatch, fresh):
    lm = load("gpt-oss-tales", dtype="float32", max_length=256)
    wider = dataclasses.replace(lm.config, windows=(129, *lm.config.windows[1:]))
    rows = transformers_comparison.compare(build(wider), lm.params, hub.resolve("gpt-oss-tales"), list(range(3, 203)))
    assert transformers_comparison.first_difference(rows).stage == "block_0/attention/heads"


@pytest.mark.parametrize(
    "changes",
    [{}, {"activation_function": "gelu"}, {"n_inner": 52, "scale_attn_by_inverse_layer_idx": True}, {"n_head": 5}],
)
def test_random_models_agree_at_every_stage(tmp_path, changes):
    sizes = {"vocab_size": 101, "n_positions": 64, "n_embd": 60, "n_layer": 3, "n_head": 6, "initializer_range": 0.3}
    config = transformers.GPT2Config(**sizes | changes, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    assert _first_difference(tmp_path) is None


class NoMean(nn.Module):
    """LayerNorm without taking the mean off."""

    epsilon: float
    dtype: object
    param_dtype: object
    implementation: str

    def __call__(self, residual):
        return Normed(self, residual)

    @nn.compact
    def finished(self, residual):
        x = residual.total()
        scale, bias = (self.param(name, nn.initializers.ones_init(), (x.shape[-1],)) for name in ("scale", "bias"))
        normed = x * jax.lax.rsqrt(x.var(axis=-1, keepdims=True) + self.epsilon)
        return Residual(x), observe(self, "output", normed * scale + bias)


def _rotated(q_BTNH, k_BKSH, *arguments, **options):
    """Attention with a rotation of the queries and keys, where none belongs."""

    def rotate(x, positions):
        half = x.shape[-1] // 2
        angle = positions[..., None] * 10000.0 ** (-jnp.arange(half) / half)
        first, second = x[..., :half], x[..., half:]
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    positions = jnp.arange(q_BTNH.shape[1])
    q_BTNH = rotate(q_BTNH, positions[:, None])
    k_BKSH = rotate(k_BKSH, positions)
    return REAL_ATTENTION(q_BTNH, k_BKSH, *arguments, **options)


def _unsplit(q_BTNH, *arguments, **options):
    """The heads put together in the wrong order."""
    out_BTNH = REAL_ATTENTION(q_BTNH, *arguments, **options)
    return out_BTNH.swapaxes(2, 3).reshape(out_BTNH.shape)


REAL_ATTENTION = gptjax.layers.attention.attention


@pytest.mark.parametrize(
    ("target", "name", "bug", "stage"),
    [
        (gptjax.models.gpt2, "LayerNorm", NoMean, "block_0/attention_norm"),
        (gptjax.layers.attention, "attention", _rotated, "block_0/attention/heads"),
        (gptjax.layers.attention, "attention", _unsplit, "block_0/attention/heads"),
        (
            gptjax.layers.mlp.ACTIVATIONS,
            "gelu_tanh",
            gptjax.layers.mlp.ACTIVATIONS["gelu_erf"],
            "block_0/mlp/activation",
        ),
        (gptjax.layers.mlp.ACTIVATIONS, "gelu_tanh", jax.nn.silu, "block_0/mlp/activation"),
    ],
)
def test_a_planted_bug_is_named_where_it_is(monkeypatch, fresh, target, name, bug, stage):
    if isinstance(target, dict):
        monkeypatch.setitem(target, name, bug)
    else:
        monkeypatch.setattr(target, name, bug)
    assert _first_difference("gpt2-tales") == stage


def test_the_command(capsys, monkeypatch, fresh):
    assert main(["compare", "gpt2-tales", "--values"]) == 0
    out = capsys.readouterr().out
    assert "all stages agree" in out
    assert out.count("theirs ") == 75
    assert main(["compare", "--ids", "5", "6", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == rows[0] | {"stage": "embedding", "ours": [2, 256], "theirs": [2, 256], "agrees": True}
    _forward.clear_cache()
    monkeypatch.setitem(gptjax.layers.mlp.ACTIVATIONS, "gelu_tanh", jax.nn.silu)
    assert main(["compare"]) == 1
    assert "the first stage that differs: block_0/mlp/activation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--ids", "99999"], "99999"),
        (["--ids", "-1"], "-1"),
        (["--prompt", ""], "empty"),
        (["--ids", *["1"] * 513], "513"),
    ],
)
def test_bad_ids_are_named_before_torch_sees_them(capsys, argv, says):
    assert main(["compare", *argv]) == 1
    assert says in capsys.readouterr().err


def test_a_converted_directory_is_no_matter_for_transformers(capsys, tmp_path):
    assert main(["convert", "gpt2-tales", str(tmp_path / "converted")]) == 0
    for command in (["compare"], ["bench", "--versus", "transformers"]):
        assert main([command[0], str(tmp_path / "converted"), *command[1:]]) == 1
        assert "name the Hugging Face directory" in capsys.readouterr().err


def test_a_gguf_file_is_compared_as_the_message_says(capsys, tmp_path):
    file, exported = tmp_path / "model.gguf", tmp_path / "exported"
    gguf_from_hf.write(file, *llama_random.checkpoint(5, **llama_random.VARIANTS["llama2"]))
    assert main(["compare", str(file), "--ids", "5", "6"]) == 1
    assert f"gptjax convert {file} DIRECTORY --to hf" in capsys.readouterr().err
    assert main(["convert", str(file), str(exported), "--to", "hf"]) == 0
    assert main(["compare", str(exported), "--ids", "5", "6"]) == 0
    assert "all stages agree" in capsys.readouterr().out


def test_bench_takes_turns_with_transformers(capsys):
    assert main(["bench", "--steps", "4", "--repeats", "2", "--prompt-length", "8", "--versus", "transformers"]) == 0
    out = capsys.readouterr().out
    assert "times the decode rate of transformers" in out
