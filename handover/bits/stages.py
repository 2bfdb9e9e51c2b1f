"""The first stage whose bits differ: decode of one row among n; a prompt's token in calls of several sizes and places."""
import sys, dataclasses
import jax, jax.numpy as jnp, numpy as np
import gptjax; print(jax.__version__, gptjax.__file__, sys.argv[1:])
from functools import partial
from gptjax.layers.observe import COLLECTION
from gptjax.layers.cache import KVCache
from gptjax.models import registry
from gptjax.models.params import random_params
from gptjax.models.stages import stages
from gptjax.config import GPT2Config, LlamaConfig, GptOssConfig, PUBLISHED
from pallas_kernels.pages import Tiles
name, dtype = sys.argv[1], jnp.dtype(sys.argv[2] if len(sys.argv) > 2 else "float32")
if name.endswith("tales"):
    lm = gptjax.load(name, dtype=dtype, max_length=512); model, params = lm.model, lm.params
else:
    c = PUBLISHED[name]
    config = c.with_one_layer() if hasattr(c, "with_one_layer") else c
    config = dataclasses.replace(config, vocab_size=4096)
    model = registry.build(config, dtype=dtype); params = random_params(model)
config = model.config
V = config.vocab_size
rng = np.random.default_rng(0)
@partial(jax.jit, static_argnames=("observed",))
def call(params, tokens, positions, cache, observed=True):  # noqa
    if not observed:
        (h, cache) = model.apply({"params": params}, tokens, positions, cache)
        rec = {}
    else:
        (h, cache), rec = model.apply({"params": params}, tokens, positions, cache, mutable=[COLLECTION]); rec = rec[COLLECTION]
    logits = model.apply({"params": params}, h.reshape(-1, h.shape[-1]), method="head")
    return rec, h, logits, cache
def named(rec, h, logits, pick):
    found = {}
    for path, value in jax.tree_util.tree_leaves_with_path(rec):
        n = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/output")
        v = np.asarray(value); found[n] = v.reshape(-1, *v.shape[2:])[pick]
    found["hidden"] = np.asarray(h).reshape(-1, h.shape[-1])[pick]; found["logits"] = np.asarray(logits)[pick]
    order = {s: i for i, s in enumerate(stages(config))}
    return dict(sorted(found.items(), key=lambda kv: order.get(kv[0], 1e9)))
def compare(a, b):
    bad = [n for n in a if not np.array_equal(a[n], b[n], equal_nan=True)]
    return "=" if not bad else f"X[{bad[0]} {np.abs(np.float32(a[bad[0]])-np.float32(b[bad[0]])).max():.1e}, {len(bad)}/{len(a)}]"
P = 300
prompt = rng.integers(0, V, P).astype(np.int32)
def cache_of(rows, max_length=512): return registry.create_cache(model, batch=rows, max_length=max_length)
def prefill(cache, row, tokens, start, size):
    """tokens at positions start.. in a call of `size`."""
    T = len(tokens); toks = np.zeros(size, np.int32); toks[:T] = tokens
    pos = np.where(np.arange(size) < T, start + np.arange(size), -1)[None].astype(np.int32)
    sub = dataclasses.replace(cache.rows(jnp.asarray([row])), tiles=Tiles.of(jnp.asarray(pos)))
    rec, h, logits, sub = call(params, jnp.asarray(toks[None]), jnp.asarray(pos), sub)
    return (rec, h, logits), cache.joined(jnp.asarray([row]), dataclasses.replace(sub, tiles=None))
# decode
ref = None; line = []
rows_all = eval(sys.argv[3]) if len(sys.argv) > 3 else [1, 2, 3, 4, 5, 8, 16, 31, 32, 64, 128]
for n in rows_all:
    cache = cache_of(n); _, cache = prefill(cache, n - 1, prompt, 0, 512)
    for r in range(n - 1): 
        if r < 3: _, cache = prefill(cache, r, rng.integers(0, V, 40 + r).astype(np.int32), 0, 64)
    toks = np.zeros((n, 1), np.int32); toks[:, 0] = rng.integers(0, V, n); toks[-1] = 7
    pos = np.full((n, 1), 0, np.int32); pos[:3] = 50; pos[-1] = P
    rec, h, logits, _ = call(params, jnp.asarray(toks), jnp.asarray(pos), cache)
    x = named(rec, h, logits, n - 1)
    ref = x if ref is None else ref
    line.append(f"{n}:{compare(ref, x)}"); print("decode", line[-1], flush=True)
# prompts: the token at index 299, in different cuts
def last(cuts, sizes):
    cache = cache_of(1, 2048); start = 0
    for end, size in zip(cuts, sizes):
        (rec, h, logits), cache = prefill(cache, 0, prompt[start:end], start, size); n = end - start; start = end
    return named(rec, h, logits[:size], n - 1)
ref = last([300], [512])
for cuts, sizes in (([300], [1024]), ([290, 300], [512, 32]), ([299, 300], [512, 32]), ([100, 200, 300], [128, 128, 128]), ([37, 74, 300], [64, 64, 256]), ([256, 300], [256, 64])):
    print("prompt", cuts, sizes, compare(ref, last(cuts, sizes)), flush=True)
# packed: two other rows' pieces before and after in one call
for others, size in (([100, 60], 512), ([1, 2, 3], 1024), ([700], 1024)):
    cache = cache_of(1 + len(others), 2048); toks, tiles, start = [], [], 0
    for r, n in enumerate([*others, 300]):
        t = prompt if r == len(others) else rng.integers(0, V, n).astype(np.int32)
        toks.append(t); tiles += [(r, start + a, min(128, n - a), a) for a in range(0, n, 128)]; start += n
    t = np.zeros(size, np.int32); t[:start] = np.concatenate(toks)
    tl = Tiles(*map(jnp.asarray, np.asarray(tiles, np.int32).T))
    posn = tl.tokens(size)[1][None]
    rec, h, logits, _ = call(params, jnp.asarray(t[None]), posn, cache.packed(tl))
    print("packed", others, size, compare(ref, named(rec, h, logits, start - 1)), flush=True)
# decoded
cache = cache_of(1); _, cache = prefill(cache, 0, prompt[:299], 0, 512)
rec, h, logits, _ = call(params, jnp.asarray([[prompt[299]]]), jnp.asarray([[299]], jnp.int32), cache)
print("decoded instead of read", compare(ref, named(rec, h, logits, 0)))
