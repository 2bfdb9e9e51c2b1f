"""Half precision against float32, on text that the model was not trained on."""

import numpy as np
import pytest

import gptjax

CHUNKS, LENGTH = 24, 512


@pytest.fixture(scope="module")
def held_out(lm, request):
    text = (request.config.rootpath / "tests" / "data" / "held-out.txt").read_text()
    ids = lm.tokenizer.encode(text)[: CHUNKS * LENGTH]
    return [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)]


def _evaluate(lm, chunks) -> tuple[np.ndarray, float]:
    """The most likely token at each position, and the perplexity, in float64 from the logits on."""
    top, losses = [], []
    for ids in chunks:
        logits_TV = lm.logits(ids).astype(np.float64)
        top.append(logits_TV.argmax(-1))
        logits_TV -= logits_TV.max(-1, keepdims=True)
        logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        losses.append(-logprobs_TV[np.arange(len(ids) - 1), ids[1:]])
    return np.concatenate(top), float(np.exp(np.concatenate(losses).mean()))


@pytest.fixture(scope="module")
def exact(lm, held_out):
    return _evaluate(lm, held_out)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_agrees_with_float32(dtype, held_out, exact):
    top, perplexity = _evaluate(gptjax.load("gpt2-tales", dtype=dtype), held_out)
    assert (top == exact[0]).mean() >= 0.97
    assert perplexity == pytest.approx(exact[1], rel=0.01)
