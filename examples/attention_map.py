"""Which token each token looks at, in a few heads, with the share that goes to the sink. Needs matplotlib."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import gptjax
from gptjax.layers.rope import rotate, rotation

try:
    from matplotlib.figure import Figure  # not pyplot, which may look for a display
except ImportError:
    sys.exit("this example draws with matplotlib: pip install '.[plot]'")

HEADS = ((0, 1), (1, 3), (5, 5), (5, 1))  # block, query head

lm = gptjax.load("gpt-oss-tales", dtype="float32", max_length=128)
config = lm.config
ids = lm.tokenizer.encode("The king had a daughter, and the daughter of the king had a golden ball.")
words = [lm.tokenizer.decode([token]).strip() for token in ids]
seen = lm.activations(ids)
T, N, K = len(ids), config.num_heads, config.num_kv_heads
turn = rotation(config.rope, config.head_width, jnp.arange(T)[None])


def attention(block: int) -> np.ndarray:
    """The weights [N, T, 1 + T] of a block, that of the sink first. (The text is shorter than the window.)"""
    q_TNH, k_TKH = (rotate(seen[f"block_{block}/attention/{name}"][None], *turn)[0] for name in "qk")
    scores_NTS = jnp.einsum("tnh,snh->nts", q_TNH, jnp.repeat(k_TKH, N // K, axis=1)) / config.head_width**0.5
    scores_NTS = jnp.where(jnp.tri(T, dtype=bool), scores_NTS, -jnp.inf)
    sinks_N = lm.params[f"block_{block}"]["attention"]["sinks"]
    exponentials = np.exp(jnp.pad(scores_NTS, ((0, 0), (0, 0), (1, 0))).at[:, :, 0].set(sinks_N[:, None]))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


figure = Figure(figsize=(9, 8.5), dpi=80, layout="constrained")
for axes, (block, head) in zip(figure.subplots(2, 2).flat, HEADS, strict=True):
    image = axes.imshow(attention(block)[head], vmin=0, vmax=1, cmap="Blues")
    axes.set(title=f"block {block}, head {head}", ylabel="query", xlabel="key")
    axes.set_yticks(range(T), words)
    axes.set_xticks(range(1 + T), ["sink", *words], rotation=90)
figure.colorbar(image, ax=figure.axes, label="attention weight", shrink=0.5)

path = Path(sys.argv[1] if len(sys.argv) > 1 else "build/attention-map.png")
path.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(path)
print(path)
