"""`/v1/messages`: what the model reads is what it would read from chat completions."""

import json

import pytest

from tests.server.anthropic_material import SCHEMA, SIGNED, WEATHER, assistant, message, result, text, used, user
from tests.server.responses_material import ANSWER, talking
from tests.server.server_material import GPT_OSS, USER, chat, tokenizer

FUNCTION = {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": SCHEMA}}


def prompt_of(response, service):
    assert response.status_code == 200, response.text
    return tokenizer(GPT_OSS).decode(service.worker.requests[-1].prompt_ids, special=True)


def called(**given):
    function = {"name": "weather", "arguments": json.dumps(given)}
    return {"tool_calls": [{"id": "call_x", "type": "function", "function": function}]}


def told(content):
    return {"role": "tool", "tool_call_id": "call_x", "content": content}


USED = assistant(used(city="Oslo"))
CALLED = {"role": "assistant", "content": None, **called(city="Oslo")}
CONVERSATIONS = {
    "a text": ({}, [USER], [USER]),
    "a system prompt": ({"system": "Be kind."}, [USER], [{"role": "system", "content": "Be kind."}, USER]),
    "a system prompt in blocks, Claude Code's header left out": (
        {
            "system": [
                text("x-anthropic-billing-header: 1"),
                text("Be", cache_control={"type": "ephemeral"}),
                text(" kind."),
            ]
        },
        [USER],
        [{"role": "system", "content": "Be kind."}, USER],
    ),
    "a later system message": (
        {},
        [USER, {"role": "system", "content": [text("Now be brief.")]}],
        [USER, {"role": "system", "content": "Now be brief."}],
    ),
    "system messages for one turn": (
        {},
        [
            {"role": "system", "content": "Old.", "clear_at": "next_user_message"},
            USER,
            {"role": "system", "content": "New.", "clear_at": "next_user_message", "output_config": {"effort": "high"}},
            {"role": "system", "output_config": {"effort": "medium"}},
        ],
        [USER, {"role": "system", "content": "New."}],
    ),
    "texts in blocks": (
        {},
        [user(text("One, "), text("two.", cache_control=None, citations=[]))],
        [{"role": "user", "content": "One, two."}],
    ),
    "a call and its result": ({}, [USER, USED, user(result("rain"))], [USER, CALLED, told("rain")]),
    "all that a turn may say": (
        {},
        [
            USER,
            assistant(SIGNED, text("Let me look."), *USED["content"]),
            user(result([text("ra"), text("in")]), text("And "), text("now?")),
        ],
        [
            USER,
            {"role": "assistant", "reasoning_content": "The king is old.", "content": None},
            {"role": "assistant", "content": "Let me look.", "phase": "commentary"},
            CALLED,
            told("rain"),
            {"role": "user", "content": "And now?"},
        ],
    ),
    "thinking that was omitted": (
        {},
        [USER, assistant(SIGNED | {"thinking": ""}, used()), user(result(""))],
        [USER, {"role": "assistant", "reasoning_content": "The king is old.", **called()}, told("")],
    ),
    "another's signature": (
        {},
        [USER, assistant(SIGNED | {"signature": "Eq0B"}, used()), user(result(""))],
        [USER, {"role": "assistant", "reasoning_content": "The king is old.", **called()}, told("")],
    ),
    "a call that failed": (
        {},
        [USER, USED, user(result("no such city", is_error=True))],
        [USER, CALLED, told("Error: no such city")],
    ),
    "an answer of nothing": ({}, [USER, assistant(), USER], [USER, {"role": "assistant", "content": ""}, USER]),
}


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_a_prompt_is_what_chat_completions_make_of_it(case):
    fields, messages, as_chat = CONVERSATIONS[case]
    ours, theirs = talking(ANSWER), talking(ANSWER)
    found = prompt_of(message(ours, messages=messages, tools=[WEATHER], **fields), ours)
    assert found == prompt_of(chat(theirs, messages=as_chat, tools=[FUNCTION]), theirs)


@pytest.mark.parametrize(
    ("fields", "as_chat"),
    [
        ({"output_config": {"effort": "high"}}, {"reasoning_effort": "high"}),
        ({"output_config": {"effort": "max"}}, {"reasoning_effort": "high"}),
        (
            {
                "messages": [USER, {"role": "system", "output_config": {"effort": "low"}}],
                "output_config": {"effort": "max"},
            },
            {"reasoning_effort": "low"},
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, {}),
        (
            {"thinking": {"type": "adaptive", "display": "omitted"}, "output_config": {"effort": "low"}},
            {"reasoning_effort": "low"},
        ),
        ({"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}, {"reasoning_effort": "low"}),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
            {"tools": [FUNCTION]},
        ),
        ({"tools": [WEATHER], "tool_choice": {"type": "none"}}, {}),
        ({"tools": [WEATHER | {"type": "custom", "strict": True}]}, {"tools": [FUNCTION]}),
        ({"tools": [WEATHER, WEATHER | {"name": "later", "defer_loading": True}]}, {"tools": [FUNCTION]}),
    ],
)
def test_options_are_those_of_chat_completions(fields, as_chat):
    ours, theirs = talking(ANSWER), talking(ANSWER)
    assert prompt_of(message(ours, **fields), ours) == prompt_of(chat(theirs, **as_chat), theirs)


def test_a_tool_is_offered_once_a_search_has_found_it():
    search, found = WEATHER | {"name": "ToolSearch"}, [{"type": "tool_reference", "tool_name": "weather"}]
    messages = [
        USER,
        assistant(used() | {"name": "ToolSearch"}),
        user(result(found)),
    ]
    service = talking(ANSWER)
    tools = [search, WEATHER | {"defer_loading": True}, WEATHER | {"name": "other", "defer_loading": True}]
    prompt = prompt_of(message(service, messages=messages, tools=tools), service)
    assert "type weather = " in prompt and "type other = " not in prompt
    assert "The tool weather is available now." in prompt
