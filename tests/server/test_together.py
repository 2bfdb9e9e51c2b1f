"""Tokens that are drawn together go out as one event, and say what they would say one by one."""

import itertools
import random
import re

import pytest

from gptjax.engine.request import Token
from gptjax.server.ipc.events import Finished, Ticket, Tokens, deliver
from gptjax.server.worker.jobs import Job
from tests.fuzz import rounds
from tests.server.responses_material import ANSWER, CALL, THOUGHT, WEATHER, respond
from tests.server.responses_material import events as items_of
from tests.server.server_material import GPT_OSS, chat, complete, events, ids, make, samples
from tests.server.worker_material import request_of

PREAMBLE = "<|channel|>commentary<|message|>Let me look.\n<|end|><|start|>assistant"
TURNS = [
    THOUGHT + ANSWER,
    THOUGHT + PREAMBLE + THOUGHT + CALL,
    PREAMBLE + PREAMBLE + ANSWER,
    CALL.replace("<|call|>", "<|end|>") + "<|start|>assistant" + CALL.replace("call|>", "end|>") + PREAMBLE + ANSWER,
    "<|channel|>final<|message|>Grüße 🙂🙂 an dich<|return|>",
    "<|channel|>analysis<|message|>never ends",
]


def cut(token_ids, seed):
    """The tokens in groups of random sizes, each of which comes together; with seed 0, all of them do."""
    rng, left, groups = random.Random(seed), list(token_ids), []
    while left:
        size = rng.randint(1, 8) if seed else len(left)
        groups.append(left[:size])
        left = left[size:]
    return groups


def choices(response):
    return [choice for event in events(response) for choice in event["choices"]]


def test_tokens_that_come_together_are_one_event():
    tokens = ids(" there was once a king")
    service = make(lambda _: [tokens[:1], tokens[1:4], tokens[4:]])
    found = choices(complete(service, stream=True, max_tokens=len(tokens)))
    assert [choice["text"] for choice in found] == [" there", " was once a", " king"]
    assert [choice["finish_reason"] for choice in found] == [None, None, "length"]


def test_each_of_them_has_its_own_log_probabilities():
    tokens = ids(" there was é once<|endoftext|>")
    one_by_one = complete(make(lambda _: tokens), logprobs=2, stream=True)
    expected = {name: [] for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset")}
    for choice in choices(one_by_one):
        expected = {name: values + choice["logprobs"][name] for name, values in expected.items()}
    (choice,) = choices(complete(make(lambda _: [tokens]), logprobs=2, stream=True))
    assert choice["logprobs"] == expected
    assert len(expected["tokens"]) == len(tokens)
    assert (choice["text"], choice["finish_reason"]) == (" there was é once", "stop")


@pytest.mark.parametrize("asked", [{"stop": "o th"}, {"stop_token_ids": ids(" three")}, {"max_tokens": 2}])
def test_what_comes_with_the_end_but_after_it_is_not_there(asked):
    """Neither in the text nor in the log-probabilities, the usage or the metrics."""
    tokens = ids(" one two three four five")
    script = [tokens[:1], tokens[1:], 10.0]
    asked = {"max_tokens": 300, "logprobs": 0} | asked
    service, alone = make(lambda _: script), make(lambda _: [*tokens, 10.0])
    together, one_by_one = complete(service, **asked).json(), complete(alone, **asked).json()
    assert together["choices"] == one_by_one["choices"]
    assert together["usage"] == one_by_one["usage"]
    taken = together["usage"]["completion_tokens"]
    assert len(together["choices"][0]["logprobs"]["tokens"]) == taken < len(tokens)
    assert samples(service)["worker_tokens_generated_total",] == taken
    assert service.worker.open == {}


def test_choices_that_come_at_once_have_their_own_events():
    texts = [" a b c", " d e f"]
    scripts = [ids(text) for text in texts]
    service = make(lambda request: [scripts[request.params.seed - 1]])
    found = choices(complete(service, n=2, seed=1, stream=True, max_tokens=3))
    assert sorted((choice["index"], choice["text"]) for choice in found) == list(enumerate(texts))


def without_ids(value):
    return re.sub(r'"(id|item_id|call_id)": ?"[^"]*"|(rs|msg|fc|call|resp|chatcmpl)_?-?[0-9a-f]{24}', "", str(value))


@pytest.mark.parametrize("turn", TURNS)
def test_a_turn_says_the_same_however_its_tokens_come(turn):
    """In one piece and in a stream, where no event has both reasoning and answer."""
    tokens = ids(turn, GPT_OSS)
    tool = {"type": "function", "function": {name: WEATHER[name] for name in ("name", "description", "parameters")}}
    asked = {"tools": [tool], "max_tokens": len(tokens), "logprobs": True, "top_logprobs": 1}

    def said(script):
        return choices(chat(make(script, name=GPT_OSS), stream=True, **asked))

    def textless(choice):
        """Such as the role and the end."""
        return not any(choice["delta"].get(kind) for kind in ("content", "reasoning", "tool_calls"))

    def runs(found):
        """Reasoning, answer and calls in order, each with the tokens of its log-probabilities."""
        pieces = []
        for choice in found:
            entries = [
                (entry["token"], entry["logprob"]) for entry in (choice["logprobs"] or {"content": []})["content"]
            ]
            for kind in ("reasoning", "content"):
                if text := choice["delta"].get(kind):
                    pieces.append((kind, text, entries if kind == "content" else []))
            for call in choice["delta"].get("tool_calls", ()):
                begins = [("name", call["function"]["name"], [])] if "id" in call else []
                pieces += [*begins, (f"call {call['index']}", call["function"]["arguments"], [])]
        return [
            (kind, "".join(text for _, text, _ in group), [entry for *_, entries in group for entry in entries])
            for kind, group in (
                (kind, list(group)) for kind, group in itertools.groupby(pieces, lambda piece: piece[0])
            )
        ]

    expected = said(lambda _: tokens)
    whole = chat(make(lambda _: tokens, name=GPT_OSS), **asked).json()
    for seed in range(max(2, rounds(8))):
        groups = cut(tokens, seed)
        found = said(lambda _, groups=groups: groups)
        assert runs(found) == runs(expected)
        assert not any({"reasoning", "content"} <= choice["delta"].keys() for choice in found)
        assert without_ids(list(filter(textless, found))) == without_ids(list(filter(textless, expected)))
        together = chat(make(lambda _, groups=groups: groups, name=GPT_OSS), **asked).json()
        assert without_ids(together["choices"]) == without_ids(whole["choices"])
        assert together["usage"] == whole["usage"]


@pytest.mark.parametrize("turn", TURNS)
def test_a_response_has_the_same_items_however_its_tokens_come(turn):
    tokens = ids(turn, GPT_OSS)
    asked = {"tools": [WEATHER], "max_output_tokens": len(tokens), "stream": True}

    def said(script):
        """The events, those of a text's pieces joined."""
        found = items_of(respond(make(script, name=GPT_OSS), **asked))
        joined = []
        for event in found:
            event.pop("sequence_number")
            if joined and event["type"].endswith(".delta") and joined[-1]["type"] == event["type"]:
                joined[-1]["delta"] += event["delta"]
            else:
                joined.append(event)
        return re.sub(r"'created_at': \d+", "", without_ids(joined))

    expected = said(lambda _: tokens)
    for seed in range(max(2, rounds(8))):
        groups = cut(tokens, seed)
        assert said(lambda _, groups=groups: groups) == expected


def test_readers_that_wait_together_are_woken_once():
    happened = []

    def wake():
        happened.append("woken")

    def job(number, wake):
        return Job(Ticket(number), request_of(number, 3), lambda event: happened.append((number, event)) or wake, 12)

    event, end = Tokens((Token(0, 5, -0.5, ()),)), Finished("length", 3, 0, 12)
    first, second, alone = job(1, wake), job(2, wake), job(3, None)
    assert deliver([(first, event), (second, event), (alone, event), (first, end)]) == []
    assert happened == [(1, event), (2, event), (3, event), (1, end), "woken"]


def test_a_reader_that_fails_keeps_no_others_from_their_events():
    got = []

    def fails(*_):
        raise RuntimeError("the loop was closed")

    jobs = [Job(Ticket(n), request_of(n, 3), take, 12) for n, take in enumerate([fails, lambda _: fails, got.append])]
    assert deliver([(job, Finished("length", 3, 0, 12)) for job in jobs]) == jobs[:2]
    assert len(got) == 1
