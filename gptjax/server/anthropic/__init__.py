"""Anthropic's API over the same engine: `POST /v1/messages` and `/v1/messages/count_tokens`.

messages.py      the two routes
conversation.py  what comes in: system, messages and tools, in the form of OpenAI's chat API
options.py       what comes in: thinking, effort and the answer's form
blocks.py        what goes out: the content blocks of a turn, and the events that stream them
errors.py        errors in Anthropic's form
"""
