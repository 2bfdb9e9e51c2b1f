"""`truncation: "auto"`: a conversation that is too long loses its beginning."""

import random

from gptjax.server.openai.responses.truncation import last_turns
from tests.server.responses_material import ANSWER, WEATHER, answers, get, kept, outcome, prompt_of, respond
from tests.server.server_material import USER, fault

LONG = " ".join(["word"] * 60)


def turns(count):
    return [{"role": "user", "content": f"{number}: {LONG}"} for number in range(count)]


def test_a_conversation_that_is_too_long_loses_its_beginning_if_that_is_wanted():
    service = answers(ANSWER)
    system = {"role": "system", "content": "Be kind."}
    fault(respond(service, input=[system, *turns(9)]))
    body = kept(service, input=[system, *turns(9)], truncation="auto", instructions="Be brief.")
    assert body["truncation"] == "auto"
    prompt = prompt_of(service)
    assert "Be kind." in prompt and "Be brief." in prompt and "8: word" in prompt and "0: word" not in prompt
    length = len(service.worker.requests[-1].prompt_ids)
    assert 200 < length <= 300  # of 400: a quarter is left
    kept(service, input=[system, *turns(9)], truncation="auto", max_output_tokens=1000)
    assert len(service.worker.requests[-1].prompt_ids) <= 200
    kept(service, input=turns(3), truncation="auto")
    assert "0: word" in prompt_of(service)  # it fits
    error = fault(respond(service, input=turns(1) * 2 + [{"role": "user", "content": LONG * 9}], truncation="auto"))
    assert error["code"] == "context_length_exceeded"
    # What was left out is still there for who continues with more room.
    assert len(get(service, f"{body['id']}/input_items?order=asc&limit=100")["data"]) == 10


def test_what_is_left_out_was_read_first():
    """A prompt does not show that a message which it leaves out is invalid."""
    for wrong in ({}, {"role": None}, {"role": "wizard"}, {"role": ["user"]}, {"role": "tool"}):
        error = fault(respond(answers(ANSWER), input=[wrong | {"content": LONG * 99}, USER], truncation="auto"))
        assert error["message"].startswith("input[0] has the role")


def test_the_last_turns_are_as_many_as_fit():
    """Against trying all."""
    chance = random.Random(2)
    for _ in range(200):
        roles = [chance.choice(["user", "user", "assistant", "tool", "system"]) for _ in range(chance.randrange(1, 9))]
        messages = [{"role": role, "size": chance.randrange(9), "tool_call_id": "x"} for role in roles]
        room = chance.randrange(40)

        def fits(some, room=room):
            return sum(message["size"] for message in some) <= room

        begins = [place for place, role in enumerate(roles) if role == "user"]
        ways = [[place for place, role in enumerate(roles) if place >= begin or role == "system"] for begin in begins]
        fitting = (
            [way for way in ways if fits([messages[place] for place in way])] or ways[-1:] or [[*range(len(roles))]]
        )
        assert last_turns(messages, fits) == fitting[0]


def test_a_result_keeps_its_call():
    """Even if the user said something in between."""
    call = {"type": "function_call", "call_id": "call_x", "name": "weather", "arguments": "{}"}
    given = [*turns(3), call, *turns(1), outcome(call), USER, call | {"call_id": "call_y"}, USER]
    service = answers(ANSWER)
    kept(service, input=given, tools=[WEATHER], truncation="auto")
    prompt = prompt_of(service)
    assert prompt.count("Hello") == 2 and "word" not in prompt  # what nobody answered holds nothing up
