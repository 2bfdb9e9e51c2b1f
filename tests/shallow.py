"""The demos without most of their layers: as real to an engine or a server, and a third of the time to compile."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

import gptjax
from gptjax.models import registry

LAYERS = 2  # of gpt-oss-tales, one with a window and one without


def shallow(name: str, dtype: str = "float32", **options: Any) -> gptjax.LanguageModel:
    """A demo's first layers. The options are `LanguageModel`'s."""
    whole = gptjax.load(name, dtype=dtype)
    fields: dict[str, Any] = {"num_layers": LAYERS}
    if "windows" in {field.name for field in dataclasses.fields(whole.config)}:
        fields["windows"] = whole.config.windows[:LAYERS]
    config = dataclasses.replace(whole.config, **fields)
    left_out = {f"block_{layer}" for layer in range(LAYERS, whole.config.num_layers)}
    return gptjax.LanguageModel(
        registry.build(config, dtype=dtype),
        {part: leaves for part, leaves in whole.params.items() if part not in left_out},
        tokenizer=whole.tokenizer,
        defaults=whole.defaults,
        **{"max_length": 512} | options,
    )


def shallow_directory(demo: Path, target: Path) -> Path:
    """A checkpoint of the GPT-2 demo's first layers."""
    shutil.copytree(demo, target, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((demo / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"n_layer": LAYERS}))
    tensors = load_file(demo / "model.safetensors")
    left_out = re.compile(rf"(.*\.)?h\.[{LAYERS}-{config['n_layer'] - 1}]\.")
    kept = {name: array for name, array in tensors.items() if not left_out.match(name)}
    save_file(kept, target / "model.safetensors")
    return target
