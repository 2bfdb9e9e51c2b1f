"""Several prompts at once, of different lengths, as text or token ids. Rows do not affect each other."""

import gptjax

# With `max_batch`, a prompt's tokens and log-probabilities are bit-identical in any batch.
lm = gptjax.load("gpt2-tales", max_batch=4)

prompts = ["The old man", "In the middle of the garden there stood a very tall tree, and", "She said:"]
together = lm.generate(prompts, max_tokens=24)
for prompt, completion in zip(prompts, together, strict=True):
    print(f"{prompt}|{completion.text!r}")

alone = lm.generate(prompts[1], max_tokens=24)
assert alone.token_ids == together[1].token_ids and alone.logprobs == together[1].logprobs

ids = lm.tokenizer.encode("The old man")
top = lm.generate(ids, max_tokens=1, top_logprobs=3).top_logprobs[0]
print({lm.tokenizer.decode([token]): round(logprob, 2) for token, logprob in top.items()})
