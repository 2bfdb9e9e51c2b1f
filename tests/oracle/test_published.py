"""The published SmolLM2-135M-Instruct in Q4_1, against transformers with the same weights expanded by the gguf package.

llama.cpp itself is no measure here: it rounds activations to eight bits, which moves log-probabilities by up to 0.56.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import gptjax  # noqa: E402
from gptjax.checkpoints import smollm2  # noqa: E402
from gptjax.diagnostics.info import describe  # noqa: E402

pytestmark = pytest.mark.real
PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "Water boils at",
    "The three primary colours are",
    "My favourite animal is the",
    "In 1969,",
    "To bake bread you need",
    "Kubernetes is",
    "The square root of 144 is",
]


@pytest.fixture(scope="module")
def lm():
    return gptjax.load("smollm2", dtype="float32", max_length=256)


@pytest.fixture(scope="module")
def theirs():
    path = smollm2.find()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return tokenizer, model.eval()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_tokens_and_log_probabilities(lm, theirs, prompt):
    tokenizer, model = theirs
    ids = tokenizer(prompt).input_ids
    assert lm.tokenizer.prompt(prompt) == ids
    with torch.no_grad():
        whole = model.generate(
            torch.tensor([ids]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0]
        expected = torch.log_softmax(model(whole[None]).logits[0].double(), -1).numpy()
    found = lm.generate(ids, max_tokens=64, temperature=0.0, ignore_eos=True)
    assert list(found.token_ids) == whole.tolist()[len(ids) :]
    logits = np.float64(lm.logits(whole.tolist()))
    largest = logits.max(-1, keepdims=True)
    ours = logits - largest - np.log(np.exp(logits - largest).sum(-1, keepdims=True))
    np.testing.assert_allclose(ours, expected, atol=1e-3)


def test_conversations_are_rendered_as_the_template_says(lm, theirs):
    tokenizer, _ = theirs
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    turn = lm.chat(messages, max_tokens=40, temperature=0.0)
    assert turn.completion.usage.prompt_tokens == len(tokenizer(expected, add_special_tokens=False).input_ids)
    assert "Paris" in turn.text
    assert turn.finish_reason == "stop"


def test_info():
    facts = describe("smollm2")
    assert facts["parameters"] == 134_515_008
    assert facts["form"] == "GGUF, 210 Q4_1, 61 F32, 1 Q8_0"
