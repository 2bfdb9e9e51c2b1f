"""Real clients, unchanged, against the server with a model: what they show is what the library gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gptjax
from tests.server.server_material import DEMO, GPT_OSS, USER, served

pytestmark = pytest.mark.clients

OPTIONS = {"temperature": 0.7, "seed": 4, "max_tokens": 60}


@pytest.fixture(scope="module")
def lm():
    """The small GPT-OSS, in float32."""
    return gptjax.load(GPT_OSS, dtype="float32", max_length=512, max_batch=4)


@pytest.fixture(scope="module")
def address(lm):
    with served(lm, GPT_OSS) as (_, address):
        yield address


@pytest.fixture(scope="module")
def turn(lm):
    """What the library gives, by itself."""
    found = lm.chat([USER], reasoning_effort="medium", **OPTIONS)
    assert found.reasoning and found.text
    return found


def test_openai(address, turn):
    import openai

    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        message = client.chat.completions.create(model=GPT_OSS, messages=[USER], **OPTIONS).choices[0].message
        assert (message.reasoning, message.content) == (turn.reasoning, turn.text)
        response = client.responses.create(
            model=GPT_OSS, input="Hello", temperature=0.7, max_output_tokens=60, extra_body={"seed": 4}
        )
        assert response.output_text == turn.text


def test_langchain(address, turn):
    from langchain_openai import ChatOpenAI

    options = {"base_url": f"{address}/v1", "api_key": "any", "model": GPT_OSS, "max_retries": 0}
    model = ChatOpenAI(**options, **OPTIONS, stream_usage=True)
    assert model.invoke("Hello").content == turn.text
    chunks = list(model.stream("Hello"))
    assert "".join(chunk.content for chunk in chunks) == turn.text
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) > 0
    # Reasoning comes through /v1/responses only: of chat completions LangChain drops it.
    sampling = {"temperature": 0.7, "max_tokens": 60, "extra_body": {"seed": 4}}
    answer = ChatOpenAI(**options, **sampling, use_responses_api=True).invoke("Hello")
    kinds = {block["type"]: block for block in answer.content}
    assert kinds["text"]["text"] == turn.text
    assert kinds["reasoning"]["content"][0]["text"] == turn.reasoning


def _curl(*argv: str) -> str:
    command = ["curl", "--silent", "--show-error", "--no-buffer", "--max-time", "60", *argv]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=90).stdout


def test_curl(address, turn):
    body = json.dumps({"model": GPT_OSS, "messages": [USER], "stream": True, **OPTIONS})
    header = "Content-Type: application/json"
    *lines, end = _curl(f"{address}/v1/chat/completions", "-H", header, "-d", body).strip().split("\n\n")
    assert end == "data: [DONE]"
    deltas = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"] for line in lines]
    assert "".join(delta.get("content", "") for delta in deltas) == turn.text
    assert json.loads(_curl(f"{address}/health"))["resident"] is True
    refused = _curl(f"{address}/v1/chat/completions", "-d", "{", "-w", "%{http_code}")
    assert refused.endswith("400") and '"bad_json"' in refused


def test_the_chat_page(address, browser, tmp_path):
    tab = browser.new_page()
    # Drawn by chance, an answer may begin at once, without any reasoning.
    tab.route(
        "**/v1/chat/completions", lambda route: route.continue_(post_data={**route.request.post_data_json, "seed": 4})
    )
    tab.goto(address)
    tab.fill("#message", "Hello")
    tab.click("#send")
    tab.wait_for_selector("#send:enabled", timeout=60_000)
    tab.click(".assistant .reasoning summary")
    assert tab.inner_text(".assistant .reasoning div").strip()
    assert tab.inner_text(".assistant .answer").strip()
    tab.screenshot(path=Path(os.environ.get("ARTIFACTS", tmp_path)) / "chat-page.png")
    tab.close()


TASK = """
task: tales
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
QUESTIONS = [
    {"text": "Once upon a", "choices": [" time", " king"], "answer": 0},
    {"text": "The king and the queen had a", "choices": [" the", " son"], "answer": 1},
    {"text": "They lived happily ever", "choices": [" after", " before they were", " sea"], "answer": 0},
]


def evaluate(address, where, *tasks, **more):
    """lm-evaluation-harness, through `local-completions`. Gives its results, and its samples in their order."""
    settings = {
        "model": GPT_OSS,
        "base_url": f"{address}/v1/completions",
        "tokenizer": DEMO / GPT_OSS,
        "tokenizer_backend": "huggingface",
        "num_concurrent": 3,
    } | more
    given = ",".join(f"{name}={value}" for name, value in settings.items())
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", given, "--tasks"]
    command += [",".join(tasks), "--include_path", where, "--log_samples", "--output_path", where / "out"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(where / "hub")}
    subprocess.run(command, check=True, timeout=300, env=os.environ | offline, cwd=where)
    (results,) = (where / "out").rglob("results_*.json")
    (samples,) = (where / "out").rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(results.read_text())["results"], sorted(lines, key=lambda line: line["doc_id"])


def test_the_evaluation_harness(address, lm, tmp_path):
    """Its log-likelihoods are those of teacher forcing."""
    (tmp_path / "tales.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "tales.yaml").write_text(TASK.format(file=tmp_path / "tales.jsonl"))
    results, samples = evaluate(address, tmp_path, "tales")
    assert results["tales"]["acc,none"] == 1.0
    for sample in samples:
        for choice, (response,) in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            expected = _log_likelihood(lm, sample["doc"]["text"], choice)
            assert float(response[0]) == pytest.approx(expected, abs=1e-4)


ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
TEXTS = [
    "<|start|>user<|message|>Hello<|end|><|start|>assistant<|channel|>final<|message|>Once upon a time there was.",
    "Once upon a time there was a king who had a daughter.",
]


def test_the_evaluation_harness_by_text_and_by_ids(address, tmp_path):
    """A text that begins with the end-of-text token, as rolling ones do, and one with marks of its own."""
    found = []
    for kind in ("True", "False"):
        where = tmp_path / kind
        where.mkdir()
        (where / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
        (where / "rolling.yaml").write_text(ROLLING.format(file=where / "texts.jsonl"))
        found.append(evaluate(address, where, "rolling", tokenized_requests=kind))
    (by_ids, ids_samples), (by_text, text_samples) = found
    assert by_text["rolling"]["bits_per_byte,none"] == by_ids["rolling"]["bits_per_byte,none"]
    assert [sample["resps"] for sample in text_samples] == [sample["resps"] for sample in ids_samples]


def _log_likelihood(lm: gptjax.LanguageModel, text: str, continuation: str) -> float:
    import jax

    ids, given = lm.tokenizer.encode(text + continuation), len(lm.tokenizer.encode(text))
    logprobs_TV = jax.nn.log_softmax(lm.logits(ids))
    return float(sum(logprobs_TV[place - 1, ids[place]] for place in range(given, len(ids))))
