"""Perplexities of both demos on held-out text against transformers', live, in float32.

The windows are those of Hugging Face's guide to perplexity, written out here, with transformers' own loss. Its
tokenizer is theirs too. GPT-OSS's experts are dequantised by transformers, which needs accelerate.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import gptjax
from gptjax.diagnostics.perplexity import perplexity

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle

ROOT = Path(__file__).resolve().parents[2]
CHARACTERS = 40_000  # of the 328,000 of the text: some 10,000 tokens
TOLERANCE = 1e-4  # relative; both compute in float32. 0.005 is what is asked for, 1e-6 what was seen


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "tests" / "data" / "held-out.txt").read_text(encoding="utf-8")[:CHARACTERS]


@pytest.fixture(scope="module", params=["gpt2-tales", "gpt-oss-tales"])
def model(request) -> tuple[str, Any, Any]:
    """A demo's name, and transformers' model and tokenizer of it."""
    if request.param == "gpt-oss-tales":
        pytest.importorskip("accelerate")
    directory = ROOT / "gptjax" / "demo" / request.param
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if request.param == "gpt-oss-tales":
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    return request.param, theirs, transformers.AutoTokenizer.from_pretrained(directory)


def _theirs(model: Any, ids: list[int], size: int, stride: int) -> tuple[float, int]:
    """The guide's loop. Its loss is a mean over a window's tokens, so it is weighted with how many those are."""
    total, count, before = 0.0, 0, 0
    for start in range(0, len(ids), stride):
        end = min(start + size, len(ids))
        window = torch.tensor([ids[start:end]])
        labels = window.clone()
        labels[:, : before - start] = -100
        if predicted := int((labels[:, 1:] != -100).sum()):
            with torch.no_grad():
                loss = model(window, labels=labels, use_cache=False).loss
            total += float(loss) * predicted
            count += predicted
        before = end
        if end == len(ids):
            break
    return float(np.exp(total / count)), count


@pytest.mark.parametrize(("size", "stride", "tokens"), [(512, 512, 3000), (512, 200, 1500), (1500, 1500, 2500)])
def test_perplexity(model, text, size, stride, tokens):
    name, theirs, tokenizer = model
    if name == "gpt2-tales" and size > 512:
        size = stride = 300  # it has 512 positions
    ids = tokenizer(text)["input_ids"][:tokens]
    with jax.default_matmul_precision("highest"), gptjax.load(name, dtype="float32", max_length=size) as lm:
        assert lm.tokenizer.encode(text)[:tokens] == ids
        found = perplexity(lm, ids, stride=stride)
    value, count = _theirs(theirs, ids, size, stride)
    assert found.num_tokens == count
    assert found.value == pytest.approx(value, rel=TOLERANCE)
