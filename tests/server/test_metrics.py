"""`/metrics`."""

import asyncio
import dataclasses
import json
import re
import time
from importlib import resources

from gptjax.server.ipc.events import Failed
from tests.server.server_material import ask, complete, ids, make, samples, saying


def test_what_was_done_is_counted():
    service = make(saying(" there was<|endoftext|>"))
    complete(service, prompt=["Once upon", "The"], max_tokens=20)
    complete(service, temperature=-1)
    found = samples(service)
    assert found["worker_tokens_generated_total",] == 6
    assert found["worker_inference_duration_ms_count",] == 2
    assert found["gptjax_time_to_first_token_seconds_count",] == 2
    assert found["gptjax_time_per_output_token_seconds_count",] == 2
    assert found["gptjax_prompt_tokens_total",] == len(ids("Once upon")) + len(ids("The"))
    assert found["gptjax_cached_prompt_tokens_total",] == 4
    assert found["gptjax_http_requests_total", "/v1/completions", "200"] == 1
    assert found["gptjax_http_requests_total", "/v1/completions", "400"] == 1
    assert found["gptjax_errors_total", "invalid_request_error"] == 1


def test_the_worker_is_watched():
    service = make()
    found = samples(service)
    state = service.worker.state
    assert found["worker_vram_bytes",] == 1234
    assert found["gptjax_ready",] == 1
    assert found["gptjax_slots",] == state.slots
    assert found["gptjax_slots_busy",] == state.busy
    assert found["gptjax_queue_length",] == state.queued
    assert found["gptjax_cache_used_ratio",] == state.cache_used
    assert found["gptjax_heartbeat_age_seconds",] == state.heartbeat_age
    assert found["gptjax_device_failures",] == state.losses == 3


def test_a_fault_of_ours_is_counted_as_an_answer():
    service = make()
    service.worker.submit = None
    assert complete(service).status_code == 500
    found = samples(service)
    assert found["gptjax_http_requests_total", "/v1/completions", "500"] == 1
    assert found["gptjax_errors_total", "internal"] == 1


def test_tokens_are_counted_as_they_come():
    """Also those of requests that come to no good end."""
    service = make(lambda request: [*ids(" a b"), Failed("it broke", "not_finite")])
    complete(service)
    assert samples(service)["worker_tokens_generated_total",] == 2


def test_errors_are_counted_by_code():
    service = make(lambda request: [Failed("it broke", "not_finite")])
    complete(service)
    complete(service, stream=True)
    full = dataclasses.replace(service)
    full.worker.room = 0
    complete(full)
    found = samples(service)
    assert found["gptjax_errors_total", "not_finite"] == 2
    assert found["gptjax_errors_total", "queue_full"] == 1


def test_paths_that_clients_make_up_do_not_fill_the_registry():
    service = make()
    for number in range(3):
        ask(service, "GET", f"/{number}")
    assert samples(service)["gptjax_http_requests_total", "404", "other"] == 3


def test_the_dashboard_shows_all_metrics_and_no_others():
    service = make()
    complete(service)
    complete(service, temperature=-1)
    names = {name for name, *_ in samples(service) if not name.endswith(("_created", "_count", "_sum"))}
    dashboard = json.loads((resources.files("gptjax.server.http") / "grafana.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    named = {name for text in expressions for name in re.findall(r"\b(?:gptjax|worker)_\w+", text)}
    assert named == names
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for text in expressions:
        assert text.count("(") == text.count(")") and text.count("{") == text.count("}")


def test_answers_are_timed_from_when_the_request_was_read():
    service = make(lambda request: [0.2, *ids(" a<|endoftext|>")])

    async def slow():
        yield b'{"prompt": '
        await asyncio.sleep(0.3)
        yield b'"a"}'

    began = time.monotonic()
    ask(service, "POST", "/v1/completions", content=slow())
    seconds = time.monotonic() - began
    found = samples(service)
    assert found["gptjax_http_answer_seconds_count", "/v1/completions", "200"] == 1
    assert 0.2 <= found["gptjax_http_answer_seconds_sum", "/v1/completions", "200"] <= seconds - 0.3
