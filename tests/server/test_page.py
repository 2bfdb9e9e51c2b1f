"""The chat page: what it is allowed to do, and what it shows in a browser."""

import contextlib
import itertools
import json
import re
import threading
import tomllib
from pathlib import Path

import pytest

from gptjax.server.front import page
from gptjax.server.ipc.events import Failed
from tests.server.server_material import DEMO, GPT2, GPT_OSS, ask, endless, ids, make, running, saying, wait_for

SAID = "The <b>king</b> & <img src=x onerror=\"document.title='run'\">"
TURN = (
    f"<|channel|>analysis<|message|>Old: {SAID}<|end|><|start|>assistant"
    f"<|channel|>final<|message|>Late: {SAID}<|return|>"
)
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
KEPT = "gptjax.conversation."  # how the keys begin that the browser keeps conversations under


def final(text):
    return f"<|channel|>final<|message|>{text}<|return|>"


@pytest.mark.parametrize("name", page.FILES)
def test_the_page_needs_no_key_and_may_use_its_own_server_only(name):
    response = ask(make(), "GET", "/" if name == "page.html" else f"/{name}", options={"api_key": "secret"})
    assert response.status_code == 200
    assert response.headers["content-type"] == f"{page.FILES[name]}; charset=utf-8"
    assert response.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    own = dict.fromkeys(("script-src", "style-src", "connect-src"), "'self'")
    none = dict.fromkeys(("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types"), "'none'")
    assert policy == own | none | {"require-trusted-types-for": "'script'"}


def test_the_page_is_whole_and_never_makes_markup_of_text():
    texts = {name: ask(make(), "GET", "/" if name == "page.html" else f"/{name}").text for name in page.FILES}
    assert texts["page.html"].startswith("<!doctype html>")
    whole = "\n".join(texts.values())
    loaded = re.findall(r'(?:\bsrc|\bhref)="(.*?)"', whole) + re.findall(
        r'^import .* from "\./(.*?)"', whole, flags=re.M
    )
    assert {"page.html", *loaded} == set(page.FILES)
    assert not re.findall(r"https?://|@import|url\(|import\(", whole)
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser"):
        assert way not in whole
    assert not re.findall(r"\son\w+=|\sstyle=|<script>|<style>", texts["page.html"])  # the policy forbids them


def test_the_page_is_packaged():
    root, static = DEMO.parent, Path(page.__file__).parent / "static"
    package = tomllib.loads((root.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    found = {path.name for pattern in package["gptjax"] for path in root.glob(pattern) if path.parent == static}
    assert found == {path.name for path in static.iterdir()} == set(page.FILES)


# In a browser


@pytest.fixture
def opened(browser):
    """Opens the page of a server with a script; nothing that it does may break its policy or its script."""
    with contextlib.ExitStack() as stack:
        faults, asked = [], []

        def open_page(script, name=GPT_OSS, prepare=None, **options):
            service = make(script, name=name)
            _, address = stack.enter_context(running(service))
            tab = browser.new_page(**options)
            stack.callback(tab.close)
            tab.set_default_timeout(15_000)
            tab.on("pageerror", lambda error: faults.append(str(error)))
            tab.on("console", lambda message: faults.append(message.text) if "Policy" in message.text else None)
            tab.on("request", lambda request: asked.append(request.url.removeprefix(address)))
            tab.on("dialog", lambda dialog: dialog.accept())
            if prepare is not None:
                tab.add_init_script(prepare)
            tab.goto(address)
            return service, tab

        yield open_page
        assert faults == []
        assert all(url.startswith("/") for url in asked)


def send(tab, text, *, ends=True):
    tab.fill("#message", text)
    tab.press("#message", "Enter")
    if ends:
        tab.wait_for_selector("#send:enabled")


def prompt(service, number):
    return service.served.tokenizer.decode(service.worker.requests[number].prompt_ids, special=True)


def texts(tab, selector):
    return tab.locator(selector).all_text_contents()


@pytest.mark.clients
def test_reasoning_and_answer_are_shown_apart_and_as_text(opened):
    service, tab = opened(saying(TURN, name=GPT_OSS))
    send(tab, SAID)
    assert tab.title() == tab.inner_text("#model") == GPT_OSS
    assert tab.inner_text(".user .answer") == SAID
    assert not tab.is_visible(".assistant .reasoning div")
    tab.click(".assistant .reasoning summary")
    assert tab.inner_text(".assistant .reasoning div") == f"Old: {SAID}"
    assert tab.inner_text(".assistant .answer") == f"Late: {SAID}"
    assert tab.locator("main b, main img, nav b, nav img").count() == 0
    assert re.match(r"\d+ \+ \d+ tokens, first after \d", tab.inner_text("#stats"))
    tab.select_option("#effort", "high")
    send(tab, "And then?")
    assert tab.locator(".assistant .answer").count() == 2
    assert "Reasoning: high" in prompt(service, 1)
    assert f"Late: {SAID}" in prompt(service, 1)
    assert prompt(service, 1).count("<|start|>user<|message|>") == 2
    tab.click("#reset")
    send(tab, "Anew")
    assert len(service.worker.requests[2].prompt_ids) < len(service.worker.requests[1].prompt_ids)


@pytest.mark.clients
def test_a_model_that_does_not_chat_continues_the_text(opened):
    service, tab = opened(saying(" there was<|endoftext|>"), GPT2)
    send(tab, "Once upon a time")
    assert tab.inner_text(".assistant .answer").strip() == "there was"
    assert not tab.locator(".reasoning").last.is_visible()
    tab.click("#options summary")
    tab.click("#schema-example")
    send(tab, "Once")
    assert [request.grammar is not None for request in service.worker.requests] == [False, True]
    tab.click("#tools-example")
    send(tab, "Twice")
    assert "cannot call tools" in tab.inner_text("#tools-fault")
    assert len(service.worker.requests) == 2


@pytest.mark.clients
def test_a_turn_can_be_stopped_made_again_and_its_question_edited(opened):
    answers = [final("Two"), final("Three"), final("Four")]

    def script(request):
        if len(service.worker.requests) > 1:
            return ids(answers.pop(0), GPT_OSS)
        return itertools.chain(ids("<|channel|>final<|message|>", GPT_OSS), endless(request))

    service, tab = opened(script)
    send(tab, "Hello", ends=False)
    tab.wait_for_selector(".assistant .answer:has-text('a a a')")
    tab.keyboard.press("Escape")
    tab.wait_for_selector(".error:has-text('Stopped.')")
    wait_for(lambda: not service.worker.open)
    assert "a a a" in tab.inner_text(".assistant .answer")  # what came stays
    tab.click(".regenerate")
    tab.wait_for_selector("#send:enabled")
    assert service.worker.requests[1].prompt_ids == service.worker.requests[0].prompt_ids
    assert texts(tab, "article .answer") == ["Hello", "Two"]
    assert tab.locator(".error").count() == 0
    send(tab, "And?")
    tab.fill("#message", "a draft")
    tab.locator(".edit").first.click()
    assert tab.input_value("#message") == "Hello"
    tab.click("#cancel")
    assert tab.input_value("#message") == "a draft"
    tab.locator(".edit").first.click()
    send(tab, "Good day")
    assert texts(tab, "article .answer") == ["Good day", "Four"]
    assert prompt(service, 3) == prompt(service, 0).replace("Hello", "Good day")
    assert tab.input_value("#message") == "a draft"


@pytest.mark.clients
def test_a_turn_that_brings_nothing_leaves_the_conversation_as_it_was(opened):
    service, tab = opened(lambda _: [5, Failed("it <i>broke</i>", "not_finite")])
    send(tab, "Hello")
    assert "it <i>broke</i>" in tab.inner_text(".error")
    assert tab.input_value("#message") == "Hello"
    assert tab.evaluate("localStorage.length") == 0
    service.worker.script = saying(final("Good day"), name=GPT_OSS)
    send(tab, "Hello")
    service.worker.room = 0
    send(tab, "And?")
    tab.locator(".edit").first.click()
    send(tab, "Hi")
    assert "try again in 3 s" in tab.inner_text(".error")
    assert (tab.input_value("#message"), tab.is_visible("#editing")) == ("Hi", True)
    tab.click(".regenerate")
    tab.wait_for_selector(".error")
    tab.reload()
    assert texts(tab, "article .answer") == ["Hello", "Good day"]
    assert tab.locator(".error").count() == 0


@pytest.mark.clients
def test_conversations_are_kept_renamed_and_deleted(opened):
    go = threading.Event()

    def script(request):
        if len(service.worker.requests) < 4:
            return ids(TURN, GPT_OSS)
        half = ids("<|channel|>final<|message|>Half", GPT_OSS) if len(service.worker.requests) == 4 else []
        return itertools.chain(half, (0.0 for _ in range(1) if go.wait()))

    service, tab = opened(script)
    send(tab, "First\nand more")
    tab.click("#reset")
    send(tab, SAID)
    assert texts(tab, ".open") == [SAID, "First"]
    tab.fill("#title", "<i>Kings</i>")
    tab.press("#title", "Enter")
    tab.evaluate(f"localStorage.setItem('{KEPT}x', '{{'); localStorage.setItem('{KEPT}y', '{{\"messages\": [3]}}')")
    tab.reload()
    assert texts(tab, ".open") == ["<i>Kings</i>", "First", "Cannot be read", "Cannot be read"]
    assert tab.input_value("#title") == "<i>Kings</i>"
    assert texts(tab, "article .answer") == [SAID, f"Late: {SAID}"]
    assert texts(tab, ".reasoning div")[1] == f"Old: {SAID}"
    tab.locator(".open").nth(1).click()
    assert texts(tab, "article .answer")[0] == "First\nand more"
    send(tab, "Go on")
    assert prompt(service, 2).count("<|start|>user<|message|>") == 2
    assert texts(tab, ".open")[0] == "First"  # the latest
    for _ in range(2):
        tab.locator(".delete").last.click()
    tab.locator(".delete").first.click()
    assert (texts(tab, ".open"), texts(tab, "article")) == (["<i>Kings</i>"], [])
    tab.locator(".open").click()
    tab.evaluate(
        """begin => {  // as another tab would
          const key = begin + location.hash.slice(1), kept = JSON.parse(localStorage.getItem(key));
          localStorage.setItem(key, JSON.stringify({...kept, title: "Queens"}));
          dispatchEvent(new StorageEvent("storage", {key}));
        }""",
        KEPT,
    )
    assert (tab.input_value("#title"), texts(tab, ".open")) == ("Queens", ["Queens"])
    send(tab, "A reload meanwhile", ends=False)
    tab.wait_for_selector(".assistant .answer:has-text('Half')")
    tab.reload()
    assert texts(tab, "article .answer")[2:] == ["A reload meanwhile", "Half"]
    assert "cut before the answer was complete" in tab.inner_text(".error")
    send(tab, "And before its first word", ends=False)
    wait_for(lambda: len(service.worker.requests) == 5)
    tab.reload()
    assert texts(tab, "article .answer")[4:] == ["And before its first word"]
    go.set()


@pytest.mark.clients
def test_a_full_storage_is_said_and_can_be_emptied(opened):
    _, tab = opened(saying(final("Good day"), name=GPT_OSS))
    tab.evaluate(
        f"""for (let size = 1 << 22; size >= 1; size >>= 1) {{
          const key = '{KEPT}big', text = (localStorage.getItem(key) ?? '') + 'x'.repeat(size);
          try {{ localStorage.setItem(key, text); }} catch {{}}
        }}"""
    )
    send(tab, "Hello")
    assert "full or forbidden" in tab.inner_text("#notice")
    tab.click("#reset")
    tab.click(".open:has-text('Hello')")
    assert texts(tab, "article .answer") == ["Hello", "Good day"]
    tab.locator(".delete").last.click()
    assert tab.inner_text("#notice") == ""
    tab.reload()
    assert texts(tab, "article .answer") == ["Hello", "Good day"]


@pytest.mark.clients
def test_without_storage_the_page_works(opened):
    forbidden = (
        "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError'); }})"
    )
    _, tab = opened(saying(final("Good day"), name=GPT_OSS), prepare=forbidden)
    send(tab, "Hello")
    tab.click("#reset")
    assert "full or forbidden" in tab.inner_text("#notice")
    tab.click(".open:has-text('Hello')")
    assert texts(tab, "article .answer") == ["Hello", "Good day"]


@pytest.mark.clients
def test_a_tool_is_called_and_its_result_sent_back(opened):
    go = threading.Event()
    call = '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "<b>Paris</b>"}<|call|>'

    def script(_):
        if len(service.worker.requests) > 1:
            return ids(final("It rains."), GPT_OSS)
        begun, rest = call.partition("Par")[0], call.partition("<b>")[2]
        return itertools.chain(ids(begun, GPT_OSS), (0.0 for _ in range(1) if go.wait()), ids(rest, GPT_OSS))

    service, tab = opened(script)
    tab.click("#options summary")
    tab.fill("#tools", json.dumps([TOOL]))
    send(tab, "The weather?", ends=False)
    tab.wait_for_selector(".call pre:has-text('<b>')")
    assert tab.inner_text(".call pre") == '{"city": "<b>'  # as it comes
    assert tab.inner_text(".call .label") == "Call of get_weather"
    go.set()
    tab.wait_for_selector("#send:enabled")
    assert json.loads(tab.inner_text(".call pre")) == {"city": "<b>Paris</b>"}
    tab.reload()
    tab.fill(".result", '{"sky": "<i>grey</i>"}')
    tab.press(".result", "Enter")
    tab.wait_for_selector(".assistant .answer:has-text('It rains.')")
    assert texts(tab, ".tool .answer") == ['{"sky": "<i>grey</i>"}']
    tab.wait_for_selector("#message:focus")  # what had the focus is gone
    assert 'functions.get_weather to=assistant<|channel|>commentary<|message|>{"sky": "<i>grey</i>"}' in prompt(
        service, 1
    )
    assert '{"city": "<b>Paris</b>"}<|call|>' in prompt(service, 1)
    assert "type get_weather = " in prompt(service, 1)
    assert tab.locator("main b, main i, .result").count() == 0


@pytest.mark.clients
def test_the_results_of_several_calls_go_together(opened):
    """By the API's own form, as no model of ours makes two calls at a time; a call that was cut off is not sent."""
    _, tab = opened(saying(final(""), name=GPT_OSS))
    calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": "{}"}} for name in "fg"]
    bodies = []

    def answer(route):
        bodies.append(json.loads(route.request.post_data))
        finish = "length" if len(bodies) == 3 else "tool_calls"
        deltas = [{"tool_calls": [{"index": index, **call}]} for index, call in enumerate(calls)]
        choices = [{"delta": delta} for delta in deltas] + [{"delta": {}, "finish_reason": finish}]
        lines = [json.dumps({"choices": [choice]}) for choice in choices] + ["[DONE]"]
        route.fulfill(content_type="text/event-stream", body="".join(f"data: {line}\n\n" for line in lines))

    tab.route("**/v1/chat/completions", answer)
    send(tab, "Hello")
    for result, text in zip(tab.locator(".result").all(), "12", strict=True):
        result.fill(text)
    tab.click("text=Send results")
    tab.wait_for_selector("#send:enabled")
    user, turn = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "", "tool_calls": calls}
    results = [{"role": "tool", "content": text, "tool_call_id": name} for name, text in zip("fg", "12", strict=True)]
    assert bodies[1]["messages"] == [user, turn, *results]
    tab.locator(".tool .edit").first.click()
    send(tab, "3")
    assert bodies[2]["messages"] == [user, turn, results[0] | {"content": "3"}, results[1]]
    assert "no room for more" in tab.inner_text(".error")
    send(tab, "Well?")
    assert bodies[3]["messages"][4:] == [{"role": "assistant", "content": ""}, {"role": "user", "content": "Well?"}]


@pytest.mark.clients
def test_an_answer_can_be_given_a_schema(opened):
    service, tab = opened(saying(final("{}"), name=GPT_OSS))
    tab.click("#options summary")
    for schema, said in (
        ('{"type": ', "not JSON"),
        ('{"properties": {"a": {"not": {}}}}', "has 'not' at #/properties/a"),
    ):
        tab.fill("#schema", schema)
        send(tab, "Hello")
        assert said in tab.inner_text("#schema-fault")
        assert (tab.input_value("#message"), tab.locator("article").count()) == ("Hello", 0)
    assert service.worker.requests == []
    tab.click("#schema-example")
    tab.press("#message", "Enter")
    tab.wait_for_selector(".assistant .answer:has-text('{}')")
    assert service.worker.requests[0].grammar is not None
    assert tab.inner_text("#schema-fault") == ""


@pytest.mark.clients
def test_a_narrow_screen_and_a_dark_one(opened):
    _, tab = opened(saying(final("w" * 60), name=GPT_OSS), viewport={"width": 360, "height": 640}, color_scheme="dark")
    send(tab, "W" * 60)
    assert not tab.is_visible("#side")
    for opens in ("#options summary", "#menu"):
        tab.focus(opens)
        tab.keyboard.press("Enter")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 360
        assert tab.evaluate("document.documentElement.scrollHeight") <= 640
        assert tab.evaluate("document.getElementById('turns').clientHeight") >= 64
    tab.keyboard.press("Shift+Tab")  # back into the list, which stands before
    assert tab.evaluate("document.activeElement.closest('nav')?.id") == "side"
    dark = tab.evaluate("getComputedStyle(document.body).color")
    tab.emulate_media(color_scheme="light")
    assert tab.evaluate("getComputedStyle(document.body).color") != dark
    tab.click(".open")
    assert not tab.is_visible("#side")
