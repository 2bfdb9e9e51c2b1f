"""A conversation with a model that speaks harmony, turn by turn, with reasoning and answer streamed separately."""

import gptjax

lm = gptjax.load("gpt-oss-tales", max_length=4096)
messages = [{"role": "user", "content": "The old king went down to the sea, and"}]

for chunk in lm.stream_chat(messages, max_tokens=120, temperature=0.7, seed=4, reasoning_effort="low"):
    print(chunk.reasoning or chunk.text, end="", flush=True)
print()

turn = chunk.completion  # the last chunk has it
print(f"{turn.finish_reason}, {turn.completion.usage}")

messages += [turn.message, {"role": "user", "content": "And what did he find there?"}]
answer = lm.chat(messages, max_tokens=80, temperature=0.7, seed=1)
print(f"reasoning: {answer.reasoning}\nanswer: {answer.text}")
