"""The bare model: a pure function of params and tokens, under `jit` and `grad`."""

import jax
import jax.numpy as jnp

import gptjax

lm = gptjax.load("gpt2-tales", dtype="float32")
model, params = lm.model, lm.params
tokens_BT = jnp.asarray([lm.tokenizer.encode("The king and the queen had a son, and he was")])
positions_BT = jnp.arange(tokens_BT.shape[1])[None]


def next_token_loss(params):
    hidden_BTD, _ = model.apply({"params": params}, tokens_BT, positions_BT)  # without a cache
    logits_BTV = model.apply({"params": params}, hidden_BTD, method="head")
    logprobs_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
    return -jnp.take_along_axis(logprobs_BTV, tokens_BT[:, 1:, None], axis=-1).mean()


loss, gradients = jax.jit(jax.value_and_grad(next_token_loss))(params)
print(f"loss {loss:.4f}")
norms = jax.tree.map(lambda g: float(jnp.linalg.norm(g)), gradients)
print(f"gradient of the token embedding {norms['token_embedding']:.4f}, of block 0 {norms['block_0']['mlp']}")

# One level below `generate`: your own generation loop.
state = lm.init_state(batch=1)
logits_BV, state = lm.prefill(state, tokens_BT[0])
ids = []
for _ in range(12):
    token_B, state = lm.decode(state, temperature=0.7, seed=42)
    ids.append(token_B)
print(lm.tokenizer.decode([int(token_B[0]) for token_B in ids]))
