"""Every error that a page quotes is what the code says."""

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
import gptjax
import gptjax.api
from gptjax.checkpoints import weights
from gptjax.checkpoints.atomic_directory import staged
from gptjax.checkpoints.safetensors import open_directory
from gptjax.cli import main
from gptjax.config import PUBLISHED
from gptjax.engine import memory
from gptjax.models import registry
from tests.pages import PAGES, ROOT, fences, squeezed

DEMO = ROOT / "gptjax" / "demo" / "gpt2-tales"
GPT_OSS_DEMO = ROOT / "gptjax" / "demo" / "gpt-oss-tales"


def _raised(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:
        return str(error)
    raise AssertionError("nothing was raised")


def _copy(tmp_path: Path, without: str = "", demo: Path = DEMO, **changes: Any) -> Path:
    """A demo with another configuration, where None takes a key out, or without a file."""
    directory = tmp_path / "copy"
    shutil.copytree(demo, directory)
    config = json.loads((directory / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None or key not in changes}
    (directory / "config.json").write_text(json.dumps(config))
    if without:
        (directory / without).unlink()
    return directory


def _pickle(tmp_path: Path) -> Path:
    directory = _copy(tmp_path, without="model.safetensors")
    (directory / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    return directory


def _truncated(tmp_path: Path) -> Path:
    directory = _copy(tmp_path)
    os.truncate(directory / "model.safetensors", 1_000_000)
    return directory


def _changed(tmp_path: Path) -> None:
    source = open_directory(_copy(tmp_path))
    os.utime(tmp_path / "copy" / "model.safetensors")
    source.read(next(iter(source.tensors)))


def _busy(tmp_path: Path) -> str:
    with staged(tmp_path / "dst", overwrite=False, ours=lambda _: False):
        return _raised(lambda: convert.convert(DEMO, tmp_path / "dst"))


def _adapter(tmp_path: Path) -> Path:
    config = {"base_model_name_or_path": "openai-community/gpt2"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def _pipe(tmp_path: Path) -> Path:
    directory = _copy(tmp_path, without="tokenizer.json")
    os.mkfifo(directory / "tokenizer.json")
    return directory


def _quantized(tmp_path: Path, config: dict[str, str] | None) -> str:
    """What is said of the small GPT-OSS with this `quantization_config`."""
    directory = _copy(tmp_path, demo=GPT_OSS_DEMO, quantization_config=config)
    return _raised(lambda: gptjax.load(directory, max_length=128))


def _not_a_number(tmp_path: Path) -> str:
    """What is said of the small GPT-OSS with a scale of 255."""
    directory = _copy(tmp_path, demo=GPT_OSS_DEMO)
    name = "model.layers.0.mlp.experts.down_proj_scales"
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    file = directory / index["weight_map"][name]
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    data[8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]] = 255
    file.write_bytes(data)
    return _raised(lambda: gptjax.load(directory, max_length=128))


def _chat_command(monkeypatch: pytest.MonkeyPatch) -> str:
    """What `gptjax chat` says of a model without harmony."""
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    assert main(["chat", "Hello", "-m", "gpt2-tales"]) == 1
    return said.getvalue().removeprefix("gptjax: ")


def _used_state(lm: gptjax.LanguageModel) -> None:
    state = lm.init_state()
    lm.prefill(state, [1, 2])
    jax.block_until_ready(lm.prefill(state, [1, 2]))


def _with_beams(tmp_path: Path) -> gptjax.LanguageModel:
    directory = _copy(tmp_path)
    (directory / "generation_config.json").write_text('{"num_beams": 5}')
    return gptjax.load(directory)


def _forked(monkeypatch: pytest.MonkeyPatch) -> str:
    with monkeypatch.context() as patch:
        patch.setattr("gptjax.support.runtime._process", 1)
        return _raised(gptjax.load)


def _not_finite(lm: gptjax.LanguageModel) -> str:
    poisoned = jax.tree.map(lambda leaf: leaf, lm.params)
    poisoned["final_norm"] = {"scale": jnp.full_like(lm.params["final_norm"]["scale"], np.nan)} | {
        "bias": lm.params["final_norm"]["bias"]
    }
    broken = gptjax.LanguageModel(
        lm.model, poisoned, tokenizer=lm.tokenizer, defaults=lm.defaults, max_length=lm.max_length
    )
    completion = broken.generate("The king")
    assert completion.finish_reason == "error"
    return str(completion.error)


def _does_not_fit() -> str:
    model = registry.build(PUBLISHED["gpt2"])
    device = memory.device_memory()
    return str(memory.shortfall(model, batch=32, max_length=1024, has=500_000_000, device=device))


def _unknown_template(tmp_path: Path) -> gptjax.LanguageModel:
    copy = _copy(tmp_path)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    return gptjax.load(copy)


def _ran_out(lm: gptjax.LanguageModel) -> None:
    with memory.explained(lm.model, batch=1, max_length=512):
        raise MemoryError


def _started(monkeypatch: pytest.MonkeyPatch) -> str:
    jax.devices()  # starts it
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    return _raised(lambda: gptjax.load("gpt2-tales", memory=0.9))


def _hub_without_client(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    return _raised(lambda: gptjax.load("openai-community/gpt2"))


MESSAGES: dict[str, Callable[..., str]] = {
    "no such checkpoint": lambda **_: _raised(lambda: gptjax.load("gpt2-tails")),
    "no such path": lambda **_: _raised(lambda: gptjax.load("./checkpoints/gpt2")),
    "hub offline": lambda **_: _raised(lambda: gptjax.load("openai-community/gpt2")),
    "hub not installed": lambda monkeypatch, **_: _hub_without_client(monkeypatch),
    "unknown config key": lambda tmp_path, **_: _raised(lambda: gptjax.load(_copy(tmp_path, rope_theta=10000.0))),
    "settings of generation": lambda tmp_path, **_: _raised(lambda: _with_beams(tmp_path).generate("The king")),
    "unknown model type": lambda tmp_path, **_: _raised(lambda: gptjax.load(_copy(tmp_path, model_type="bert"))),
    "pickle": lambda tmp_path, **_: _raised(lambda: gptjax.load(_pickle(tmp_path))),
    "tensors missing": lambda tmp_path, **_: _raised(lambda: gptjax.load(_copy(tmp_path, n_layer=7))),
    "quantization mismatch": lambda tmp_path, **_: _quantized(tmp_path, None),
    "unknown quantization": lambda tmp_path, **_: _quantized(tmp_path, {"quant_method": "gptq"}),
    "scale 255": lambda tmp_path, **_: _not_a_number(tmp_path),
    "cannot chat": lambda lm, **_: _raised(lambda: lm.chat([{"role": "user", "content": "Hello"}])),
    "cannot chat on the command line": lambda monkeypatch, **_: _chat_command(monkeypatch),
    "unknown chat template": lambda tmp_path, **_: _raised(lambda: _unknown_template(tmp_path).chat([])),
    "truncated": lambda tmp_path, **_: _raised(lambda: gptjax.load(_truncated(tmp_path))),
    "changed": lambda tmp_path, **_: _raised(lambda: _changed(tmp_path)),
    "being written": lambda tmp_path, **_: _busy(tmp_path),
    "adapter": lambda tmp_path, **_: _raised(lambda: gptjax.load(_adapter(tmp_path))),
    "not a file": lambda tmp_path, **_: _raised(lambda: gptjax.load(_pipe(tmp_path))),
    "no tokenizer": lambda tmp_path, **_: _raised(
        lambda: gptjax.load(_copy(tmp_path, without="tokenizer.json")).generate("The king")
    ),
    "prompt too long": lambda lm, **_: _raised(lambda: lm.generate(list(range(600)))),
    "max_length too large": lambda **_: _raised(lambda: gptjax.load("gpt2-tales", max_length=1024)),
    "empty prompt": lambda lm, **_: _raised(lambda: lm.generate("")),
    "unknown option": lambda lm, **_: _raised(lambda: lm.generate("A", temprature=1)),
    "unknown dtype": lambda **_: _raised(lambda: gptjax.load("gpt2-tales", dtype="int8")),
    "not finite": lambda lm, **_: _not_finite(lm),
    "beyond float16": lambda **_: _raised(lambda: weights.cast(np.float32([1e6]), np.float16, "a weight")),
    "does not fit": lambda **_: _does_not_fit(),
    "out of memory while running": lambda lm, **_: _raised(lambda: _ran_out(lm)),
    "out of memory in JAX": lambda **_: _raised(lambda: jax.block_until_ready(jnp.zeros((1 << 50,), jnp.uint8))),
    "JAX has started": lambda monkeypatch, **_: _started(monkeypatch),
    "no GPU": lambda **_: _raised(lambda: jax.devices("gpu")),
    "forked": lambda monkeypatch, **_: _forked(monkeypatch),
    "donated": lambda lm, **_: _raised(lambda: _used_state(lm)),
}


QUOTED = {
    fence.comment.removeprefix("error: "): fence.text
    for page in PAGES
    for fence in fences(page)
    if fence.comment.startswith("error: ")
}


def test_every_quoted_message_is_triggered():
    assert set(QUOTED) == set(MESSAGES)


@pytest.mark.parametrize("name", QUOTED)
def test_a_quoted_message_is_what_the_code_says(name, lm, tmp_path, monkeypatch):
    if name == "no GPU" and jax.default_backend() == "gpu":
        pytest.skip("there is one")
    said = squeezed(MESSAGES[name](lm=lm, tmp_path=tmp_path, monkeypatch=monkeypatch))
    pattern = ".*".join(re.escape(squeezed(part)) for part in QUOTED[name].split("…"))
    # A space beside a "…" may stand for nothing.
    assert re.fullmatch(pattern.replace(r"\ .*", ".*").replace(r".*\ ", ".*"), said), said
