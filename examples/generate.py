"""The shortest way from a model's name to text, with greedy and random sampling."""

import gptjax

lm = gptjax.load("gpt2-tales")  # a demo; or a directory, or a Hub id such as "openai-community/gpt2"

completion = lm.generate("Once upon a time there was a king who had", max_tokens=40)
print(completion.text)

# Random sampling: the seed makes it repeatable, whatever else is in the batch.
completion = lm.generate("The sea was", max_tokens=40, temperature=0.8, top_p=0.95, seed=1, stop="\n\n")
print(completion.text)
print(completion.finish_reason, completion.usage, completion.timings)
