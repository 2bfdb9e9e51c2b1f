"""Streams text as it is generated. The last chunk has the whole result."""

import gptjax

lm = gptjax.load("gpt2-tales")

for chunk in lm.stream("It was a dark night, and", max_tokens=60, temperature=0.7, seed=3):
    print(chunk.text, end="", flush=True)
    if chunk.completion is not None:
        rate = chunk.completion.timings.tokens_per_second(chunk.completion.usage.completion_tokens)
        print(f"\n[{chunk.finish_reason}, {rate:.0f} tokens/s]")
