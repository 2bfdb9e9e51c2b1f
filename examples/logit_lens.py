"""What the model would say after each block, if it were the last: the logit lens. Needs matplotlib."""

import sys
from pathlib import Path

import jax
import numpy as np

import gptjax

try:
    from matplotlib.figure import Figure  # not pyplot, which may look for a display
except ImportError:
    sys.exit("this example draws with matplotlib: pip install '.[plot]'")

lm = gptjax.load("gpt2-tales", dtype="float32")
config, norm = lm.config, lm.params["final_norm"]
ids = lm.tokenizer.encode("He opened the door and went out of the house")
words = [lm.tokenizer.decode([token]).strip() for token in ids]
seen = lm.activations(ids)
stages = ["embedding", *(f"block_{block}/mlp_residual" for block in range(config.num_layers))]

rows = []
for stage in stages:  # the final norm, then the head
    hidden_TD = jax.nn.standardize(seen[stage], epsilon=config.norm_epsilon) * norm["scale"] + norm["bias"]
    logits_TV = lm.model.apply({"params": lm.params}, hidden_TD, method="head")
    rows.append(np.asarray(jax.nn.softmax(logits_TV)))
probability, best = (np.array([getattr(row, what)(axis=-1) for row in rows]) for what in ("max", "argmax"))

figure = Figure(figsize=(11, 4), dpi=90, layout="constrained")
axes = figure.subplots()
image = axes.imshow(probability, vmin=0, vmax=1, cmap="Blues", aspect="auto", origin="lower")
for (row, column), token in np.ndenumerate(best):
    color = "white" if probability[row, column] > 0.6 else "black"
    axes.text(column, row, lm.tokenizer.decode([token]).strip(), ha="center", va="center", color=color)
axes.set_yticks(range(len(rows)), ["embedding", *(f"block {block}" for block in range(config.num_layers))])
axes.set_xticks(range(len(ids)), words)
axes.set(xlabel="after this token …", title="… the likeliest next one, if the model ended here")
figure.colorbar(image, label="its probability")

path = Path(sys.argv[1] if len(sys.argv) > 1 else "build/logit-lens.png")
path.parent.mkdir(parents=True, exist_ok=True)
figure.savefig(path)
print(path)
