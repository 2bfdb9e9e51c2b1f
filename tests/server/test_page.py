"""The chat page: what it is allowed to do, and what it shows in a browser."""

import base64
import contextlib
import hashlib
import re

import pytest

from gptjax.server.events import Failed
from tests.server.server_material import GPT2, GPT_OSS, ask, endless, make, running, saying, wait_for

SAID = "The <b>king</b> & <img src=x onerror=\"document.title='run'\">"
TURN = (
    f"<|channel|>analysis<|message|>Old: {SAID}<|end|><|start|>assistant"
    f"<|channel|>final<|message|>Late: {SAID}<|return|>"
)


def page(**options):
    return ask(make(), "GET", "/", **options)


def test_the_page_needs_no_key_and_says_what_it_is():
    response = page(options={"api_key": "secret"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.text.startswith("<!doctype html>")


def test_the_page_may_run_its_own_script_and_ask_its_own_server_only():
    response = page()
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", response.text, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    none = ("default-src", "base-uri", "form-action", "frame-ancestors")
    assert policy == dict.fromkeys(none, "'none'") | {"connect-src": "'self'"}


def test_the_page_is_whole_and_never_makes_markup_of_text():
    text = page().text
    assert not re.findall(r"https?://|\bsrc=|\bhref=|@import|url\(", text)
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser"):
        assert way not in text
    assert not re.findall(r"\son\w+=|\sstyle=", text)  # the policy forbids them


# In a browser


@pytest.fixture
def opened(browser):
    """Opens the page of a server with a script; nothing that it does may break its policy or its script."""
    with contextlib.ExitStack() as stack:
        faults = []

        def open_page(script, name=GPT_OSS):
            service = make(script, name=name)
            _, address = stack.enter_context(running(service))
            tab = browser.new_page()
            stack.callback(tab.close)
            tab.set_default_timeout(15_000)
            tab.on("pageerror", lambda error: faults.append(str(error)))
            tab.on("console", lambda message: faults.append(message.text) if "Policy" in message.text else None)
            tab.goto(address)
            return service, tab

        yield open_page
        assert faults == []


def send(tab, text, *, ends=True):
    tab.fill("#message", text)
    tab.press("#message", "Enter")
    if ends:
        tab.wait_for_selector("#send:enabled")


@pytest.mark.clients
def test_reasoning_and_answer_are_shown_apart_and_as_text(opened):
    service, tab = opened(saying(TURN, name=GPT_OSS))
    send(tab, SAID)
    assert tab.title() == tab.inner_text("#model") == GPT_OSS
    assert tab.inner_text(".user .answer") == SAID
    assert tab.inner_text(".assistant .reasoning div") == f"Old: {SAID}"
    assert tab.inner_text(".assistant .answer") == f"Late: {SAID}"
    assert tab.locator("main b, main img").count() == 0
    assert re.match(r"\d+ \+ \d+ tokens, first after \d", tab.inner_text("#stats"))
    tab.select_option("#effort", "high")
    send(tab, "And then?")
    assert tab.locator(".assistant .answer").count() == 2
    prompt = service.served.tokenizer.decode(service.worker.requests[1].prompt_ids, special=True)
    assert "Reasoning: high" in prompt
    assert f"Late: {SAID}" in prompt
    assert prompt.count("<|start|>user<|message|>") == 2
    tab.click("#reset")
    send(tab, "Anew")
    assert len(service.worker.requests[2].prompt_ids) < len(service.worker.requests[1].prompt_ids)


@pytest.mark.clients
def test_a_model_that_does_not_chat_continues_the_text(opened):
    _, tab = opened(saying(" there was<|endoftext|>"), GPT2)
    send(tab, "Once upon a time")
    assert tab.inner_text(".assistant .answer").strip() == "there was"
    assert not tab.locator(".reasoning").last.is_visible()


@pytest.mark.clients
def test_a_turn_can_be_stopped(opened):
    def script(request):
        yield from saying("<|channel|>final<|message|>", name=GPT_OSS)(request)
        yield from endless(request)

    service, tab = opened(script)
    send(tab, "Hello", ends=False)
    tab.wait_for_selector(".assistant .answer:has-text('a a a')")
    tab.click("#stop")
    tab.wait_for_selector(".error:has-text('Stopped.')")
    wait_for(lambda: not service.worker.open)
    assert tab.input_value("#message") == "Hello"


@pytest.mark.clients
def test_errors_are_shown(opened):
    service, tab = opened(lambda request: [5, Failed("it <i>broke</i>", "not_finite")])
    send(tab, "Hello")
    assert "it <i>broke</i>" in tab.inner_text(".error")
    service.worker.room = 0
    send(tab, "Hello")
    assert "try again in 3 s" in tab.locator(".error").last.inner_text()
