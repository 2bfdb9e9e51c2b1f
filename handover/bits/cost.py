import sys, time
import jax, jax.numpy as jnp, numpy as np
import gptjax
from gptjax.engine import steps
from gptjax.engine.flat_params import FlatParams
lm = gptjax.load(sys.argv[1], max_length=512); params = FlatParams.of(lm.params)
work = {}
for n in (1, 8, 32):
    state = steps.init_state(lm.model, batch=n, max_length=512)
    tok = jnp.arange(n, dtype=jnp.int32) * 37 + 5; rows = jnp.arange(n, dtype=jnp.int32)
    work[f"decode {n}"] = [steps.advance.lower(lm.model, params, state, tok, rows).compile(), state, lambda f, s, tok=tok, rows=rows: f(params, s, tok, rows)]
state = steps.init_state(lm.model, batch=1, max_length=512)
chunk = jnp.asarray(steps.padded(np.arange(500, dtype=np.int32) * 7 % 8000, 0, 0, 500, 512))
work["prompt 512"] = [steps.prefill_chunk.lower(lm.model, params, state, chunk).compile(), state, lambda f, s: f(params, s, chunk)[1]]
best = dict.fromkeys(work, 1e9)
end = time.time() + float(sys.argv[2])
while time.time() < end:
    for name, item in work.items():
        for _ in range(1 if "prompt" in name else 4):
            c = time.process_time(); item[1] = item[2](item[0], item[1]); jax.block_until_ready(item[1]); best[name] = min(best[name], time.process_time() - c)
print(gptjax.__file__.split("/")[3], sys.argv[1], " ".join(f"{k}: {v*1e3:.1f}" for k, v in best.items()), flush=True)
