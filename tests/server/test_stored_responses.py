"""`/v1/responses` with memory: what is kept, for how long, and that continuing it is as sending everything again."""

import asyncio
import gc
import json
import random
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest

from gptjax.server.generation.response_store import Item, ResponseStore, Stored, size_of
from gptjax.server.http.fields import Fields
from gptjax.server.openai.responses import responses
from gptjax.server.openai.responses.memory import read_memory
from tests.server.responses_material import (
    ANSWER,
    CALL,
    LOOK,
    THOUGHT,
    WEATHER,
    answers,
    events,
    get,
    kept,
    outcome,
    prompt_of,
    respond,
)
from tests.server.server_material import GPT_OSS, USER, ask, fault, make, post, saying

PART = {"type": "input_text", "text": "Hello"}


def test_a_conversation_goes_on_as_if_everything_were_sent_again():
    service = answers(THOUGHT + LOOK + CALL, THOUGHT + ANSWER, ANSWER)
    options = {"tools": [WEATHER], "instructions": "Be kind."}
    first = kept(service, **options)
    result = outcome(first["output"][-1])
    second = kept(service, input=[result], previous_response_id=first["id"], **options)
    assert second["previous_response_id"] == first["id"]
    continued = prompt_of(service)
    third = kept(service, input="And now?", previous_response_id=second["id"], tools=[WEATHER])
    prompts = continued, prompt_of(service)

    items = [USER, *first["output"], result]
    kept(service, input=items, store=False, **options)
    assert prompt_of(service) == prompts[0]
    kept(service, input=[*items, *second["output"], {"role": "user", "content": "And now?"}], tools=[WEATHER])
    assert prompt_of(service) == prompts[1]
    assert "Be kind." in prompts[0] and "Be kind." not in prompts[1]  # instructions are of one response
    # A branch from the middle, although the first has gone.
    get(service, first["id"], method="DELETE")
    kept(service, input="And now?", previous_response_id=second["id"], tools=[WEATHER])
    assert prompt_of(service) == prompts[1]
    assert third["id"] != second["id"]


def test_an_error_names_the_places_of_the_request():
    service = answers(ANSWER)
    previous = kept(service)["id"]
    result = {"type": "function_call_output", "call_id": "call_x", "output": "rain"}
    for wrong, words in ((3, "input[1] must be an object"), (result, "input[1].call_id is 'call_x'")):
        assert words in fault(respond(service, previous_response_id=previous, input=[USER, wrong]))["message"]


def test_references_stand_for_their_items():
    service = answers(THOUGHT + LOOK + CALL, ANSWER)
    first = kept(service, tools=[WEATHER])
    (given,) = get(service, f"{first['id']}/input_items")["data"]
    references = [{"type": "item_reference", "id": item["id"]} for item in (given, *first["output"])]
    references[1].pop("type")
    kept(service, input=[*references, outcome(first["output"][-1])], tools=[WEATHER])
    referring = prompt_of(service)
    kept(service, input=[USER, *first["output"], outcome(first["output"][-1])], tools=[WEATHER])
    assert referring == prompt_of(service)
    for item_id in ("msg_1", 3, None, []):
        error = fault(respond(service, input=[USER, {"type": "item_reference", "id": item_id}]), 404)
        assert error["code"] == "item_not_found" and error["message"].startswith("input[1]: item with id")


def test_an_id_of_a_clients_own_names_nothing_of_others():
    service = answers(ANSWER)
    victim = kept(service)["output"][0]
    kept(service, input=[victim | {"content": "Something else."}, USER])
    kept(service, input=[{"type": "item_reference", "id": victim["id"]}, USER])
    assert "It was late." in prompt_of(service) and "Something else" not in prompt_of(service)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("fields", [{}, {"max_output_tokens": 4}])
def test_what_is_kept_is_what_was_answered(streams, fields):
    service = answers(THOUGHT + ANSWER)
    found = respond(service, stream=streams, **fields)
    body = events(found)[-1]["response"] if streams else found.json()
    assert body["store"] is True
    assert get(service, body["id"]) == body
    assert get(service, body["id"], method="DELETE") == {"id": body["id"], "object": "response", "deleted": True}
    for method in ("GET", "DELETE"):
        error = fault(ask(service, method, f"/v1/responses/{body['id']}"), 404)
        assert error["code"] == "response_not_found" and body["id"] in error["message"]
    error = fault(respond(service, previous_response_id=body["id"]))
    assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")


def test_what_is_not_to_be_kept_is_not():
    service = answers(ANSWER)
    body = kept(service, store=False)
    assert body["store"] is False
    get(service, body["id"], 404)
    off = answers(ANSWER, stored_responses=0)
    body = kept(off, store=True)
    assert body["store"] is False
    assert "--store-responses" in get(off, body["id"], 404)["error"]["message"]
    fault(ask(service, "GET", f"/v1/responses/{kept(service)['id']}?stream=true"))


def test_a_response_that_fails_is_not_kept():
    service = make(saying("", name=GPT_OSS), name=GPT_OSS)
    failed = events(post(service, "/v1/responses", {"input": "Hello", "stream": True}))[-1]["response"]
    assert (failed["status"], failed["store"]) == ("failed", False)
    get(service, failed["id"], 404)


def test_a_response_whose_stream_is_cut_is_not_kept():
    service = answers(THOUGHT + ANSWER)

    async def cut():
        answer = responses.Answer(service, responses.read({"input": "Hello"}, service.served, service.stored))
        answer.start()
        stream = answer.stream()
        began = await anext(stream)
        await anext(stream)
        await anext(stream)  # of an item
        answer.close()
        await stream.aclose()
        return began["response"]["id"]

    get(service, asyncio.run(cut()), 404)
    assert service.stored.get(kept(service)["id"]) is not None


def test_input_items_come_in_pages():
    service = answers(ANSWER)
    given = [
        {"role": "developer", "content": "Be kind."},
        USER,
        {
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Hi."}, {"type": "refusal", "refusal": "No."}],
        },
        {"type": "reasoning", "summary": [3], "content": "So.", "encrypted_content": [[[]]]},
        {"type": "reasoning", "summary": "Hm."},
        {"type": "function_call", "call_id": "1", "name": "weather", "arguments": "{}", "id": "fc_mine"},
        {"type": "function_call_output", "call_id": "1", "output": [PART], "unknown": [[[]]]},
    ]
    path = f"{kept(service, input=given, tools=[WEATHER])['id']}/input_items"
    whole = get(service, f"{path}?order=asc")
    assert (whole["object"], whole["has_more"], len(whole["data"])) == ("list", False, 7)
    assert [{name: value for name, value in item.items() if name != "id"} for item in whole["data"]] == [
        {"type": "message", "role": "developer", "content": [PART | {"text": "Be kind."}], "status": "completed"},
        {"type": "message", "role": "user", "content": [PART], "status": "completed"},
        {
            "type": "message",
            "role": "assistant",
            "content": [
                {"type": "output_text", "text": "Hi.", "annotations": []},
                {"type": "refusal", "refusal": "No."},
            ],
            "status": "completed",
        },
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "So."}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "1", "name": "weather", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "1", "output": [PART], "status": "completed"},
    ]
    assert whole["data"][5]["id"] == "fc_mine"
    seen, after, has_more = [], "", True
    while has_more:
        page = get(service, f"{path}?limit=2{after}")
        has_more = page["has_more"]
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        seen += page["data"]
        after = f"&after={page['last_id']}"
    assert seen == whole["data"][::-1]
    for query in ("limit=0", "limit=101", "limit=x", "limit=", "limit=%D9%A3", "order=up", "after=msg_1", "after="):
        fault(ask(service, "GET", f"/v1/responses/{path}?{query}"))


def test_no_item_is_listed_twice_under_one_id():
    """A client's library lists them page by page, from the last id of the page before."""
    service = answers(ANSWER)
    first = kept(service, input=[USER | {"id": "msg_mine"}] * 2)
    again = kept(service, input=[*first["output"], USER | {"id": "m" * 65}], previous_response_id=first["id"])
    ids = [item["id"] for item in get(service, f"{again['id']}/input_items?order=asc")["data"]]
    assert len(ids) == len(set(ids)) == 5
    assert (ids[0], ids[2]) == ("msg_mine", first["output"][0]["id"]) and max(map(len, ids)) < 40
    reference = [USER, {"type": "item_reference", "id": ids[3]}]
    assert kept(service, input=reference)["status"] == "completed"


def item(number, size):
    return Item(f"id_{number}", bytes(size))


def test_the_store_keeps_what_was_used_last_within_its_bounds():
    """Against a store that looks through all it has."""
    chance = random.Random(4)
    for _ in range(60):
        most, most_bytes = chance.randrange(8), chance.randrange(1, 9000)
        store, expected = ResponseStore(most, most_bytes, 0), {}
        for number in range(60):
            some = chance.choice([*expected, "resp_x"])
            match chance.randrange(4):
                case 0:
                    assert store.get(some) == expected.get(some)
                    if some in expected:
                        expected[some] = expected.pop(some)
                case 1:
                    assert store.remove(some) == (expected.pop(some, None) is not None)
                case 2:
                    wanted = f"id_{chance.randrange(number + 1)}"
                    owner = next((name for name, stored in expected.items() if wanted in stored.made), None)
                    found = None
                    if owner is not None:
                        expected[owner] = stored = expected.pop(owner)
                        (found,) = [each for each in (*stored.given, *stored.output) if each.id == wanted]
                    assert store.item(wanted) == found
                case _:
                    before = expected[some].given + expected[some].output if some in expected else ()
                    own = item(number, chance.randrange(60))
                    stored = Stored(bytes(chance.randrange(60)), before, (own,), frozenset([own.id]))
                    store.add(f"resp_{number}", stored)
                    expected[f"resp_{number}"] = stored
                    while len(expected) > most or sum(each.size for each in expected.values()) > most_bytes:
                        del expected[next(iter(expected))]
        assert {name: store.get(name) for name in expected} == expected


def taken_by(make):
    """What a function returns, and the bytes of memory that it keeps."""
    tracemalloc.start()
    try:
        made = make()
        gc.collect()
        return made, tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()


def test_what_a_response_takes_is_what_is_counted():
    """Tiny items take mostly what surrounds them."""

    def stored(item):
        store = ResponseStore(1, 1 << 40, 1 << 40)
        read_memory(Fields({"input": [item] * 3000}), store).kept().remember({"id": "resp_1", "output": []})
        return store

    for item in ({"type": "reasoning"}, USER, {"role": "user", "content": "word " * 99}):
        store, taken = taken_by(lambda item=item: stored(item))
        assert 0.6 < taken / store.get("resp_1").size < 1


def test_a_request_that_runs_holds_its_input_only_as_it_is_stored():
    """Parsed, it takes many times the memory."""
    served, store = answers(ANSWER).served, ResponseStore(1, 1 << 40, 1 << 40)
    body = json.dumps({"input": [{"role": "user", "content": [{"type": "text", "text": ""}] * 20_000}, USER]})
    asked, taken = taken_by(lambda: responses.read(json.loads(body), served, store))
    assert taken < 1.5 * size_of(asked.kept.given)


def test_one_conversation_is_parsed_at_a_time(monkeypatch):
    """The parser does not let other threads run, so several in turns would hold up the event loop for long."""
    store, inside, most = ResponseStore(1, 1, 1), [], []

    def loads(data):
        inside.append(data)
        time.sleep(0.001)
        most.append(len(inside))
        inside.remove(data)

    monkeypatch.setattr("gptjax.server.generation.response_store.json.loads", loads)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(store.parsed, [[item(number, 3)] * 5 for number in range(8)]))
    assert most == [1] * 40


def test_references_to_long_items_are_bounded():
    """They take forty bytes each, whatever they refer to."""
    service = answers(ANSWER, stored_conversation=20_000)
    given = kept(service, input="a " * 150)["id"]
    (long,) = get(service, f"{given}/input_items")["data"]
    error = fault(respond(service, input=[{"id": long["id"]}] * 30, store=False))
    assert (error["code"], error["param"]) == ("too_large", "input") and "more than 20000 bytes" in error["message"]


def test_the_bounds_are_those_of_the_server():
    for bounds in ({"stored_responses": 2}, {"stored_bytes": 4800}):
        service = answers(ANSWER, **bounds)
        first, second, third = (kept(service)["id"] for _ in range(3))
        get(service, first, 404)
        get(service, second)
        kept(service)
        get(service, second)
        get(service, third, 404)


def test_a_conversation_does_not_grow_for_ever():
    service = answers(ANSWER, stored_conversation=2600)
    previous = kept(service)["id"]
    fields = {"previous_response_id": previous, "input": "a " * 100 + "b", "truncation": "auto"}
    fields["previous_response_id"] = kept(service, **fields)["id"]
    error = fault(respond(service, **fields | {"input": "a " * 200}))
    assert (error["code"], error["param"]) == ("too_large", "input")
    kept(service, **fields | {"input": "a " * 200, "store": False})
