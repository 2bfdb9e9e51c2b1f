"""Converts a Hugging Face checkpoint once and loads the result, which is faster and verifies checksums."""

import tempfile
from pathlib import Path

import convert
import gptjax
from gptjax.checkpoints import hub

source = hub.resolve("gpt2-tales")  # the directory of a checkpoint

with tempfile.TemporaryDirectory() as folder:
    destination = Path(folder) / "gpt2-tales-bf16"
    convert.convert(source, destination, dtype="bfloat16")
    print(sorted(path.name for path in destination.iterdir()))

    with gptjax.load(destination, dtype="float32") as lm:
        print(lm.generate("The princess", max_tokens=30).text)
