"""Engine (scheduler + executor) on a card: rows by need, packed prompts, a shared system prompt. Prints few lines.
usage: PYTHONPATH=. python sched_engine.py [gpt-oss-20b] [slots=128] [layers=0 (all)]"""
import dataclasses, sys, time
import numpy as np, jax, jax.numpy as jnp
from gptjax.config import published
from gptjax.support import runtime
from gptjax.engine.engine import Engine
from gptjax.engine.request import Request, SamplingParams
from gptjax.models import registry
from gptjax.models.params import random_params, repacked
from gptjax.scheduling.policy import Policy

name = sys.argv[1] if len(sys.argv) > 1 else "gpt-oss-20b"
slots = int(sys.argv[2]) if len(sys.argv) > 2 else 128
runtime.enable_compilation_cache()
model = registry.build(published(name), dtype=jnp.bfloat16)
params = repacked(model, random_params(model)); jax.block_until_ready(params)
LENGTH = min(4096, model.config.context_length)
V = model.config.vocab_size; rng = np.random.default_rng(0)
ids = lambda n: rng.integers(0, V, n).tolist()
def request(prompt, tokens): return Request(tuple(prompt), tokens, SamplingParams(seed=0))

def run(engine, requests):
    """Seconds in all, and the seconds to each first token, and cached tokens."""
    start = time.perf_counter(); at = {engine.add(r): i for i, r in enumerate(requests)}; left = {n: requests[i].max_tokens for n, i in at.items()}
    first, cached, tokens = {}, {}, 0
    while left:
        for token in engine.step():
            n = token.request
            if n not in first: first[n] = time.perf_counter() - start; cached[n] = engine.cached_tokens(n)
            left[n] -= 1; tokens += 1
            if not left[n]: engine.end(n); del left[n]
    engine.wait()
    return tokens / (time.perf_counter() - start), sorted(first.values()), sum(cached.values())

def report(title, engine, make, times=3):
    best = [run(engine, make()) for _ in range(times)][1:]
    for rate, first, cached in best:
        print(f"{title:34s} {rate:8.0f} tok/s  first p50 {1e3*first[len(first)//2]:7.0f} ms  last {1e3*first[-1]:7.0f} ms  cached {cached}", flush=True)

t = time.perf_counter()
engine = Engine(model, params, batch=slots, max_length=LENGTH, policy=Policy(slots=slots, chunk=2048, steps=8))
engine.warm_up(); print(f"{name} {slots} slots packed warm-up {time.perf_counter()-t:.0f} s", flush=True)
for n in (1, 8, 32, slots):
    report(f"packed {n} rows 512+256", engine, lambda n=n: [request(ids(512), 256) for _ in range(n)])
system = ids(2048)
if LENGTH > 2200: report("packed system 2048 + 32, 64 clients", engine, lambda: [request([*system, *ids(32)], 64) for _ in range(64)])
del engine
t = time.perf_counter()
engine = Engine(model, params, batch=slots, max_length=LENGTH, reuse=True)
engine.warm_up(); print(f"same bits {slots} slots warm-up {time.perf_counter()-t:.0f} s", flush=True)
for n in (1, slots):
    report(f"same bits {n} rows 512+256", engine, lambda n=n: [request(ids(512), 256) for _ in range(n)])
