"""The kernels of a decode step of one layer, by the profiler, for several settings. Usage: packed_profile.py SECONDS"""

import collections, dataclasses, glob, sys, tempfile, time

BEGIN, SECONDS = time.time(), float(sys.argv[1])
import jax, jax.numpy as jnp
from gptjax.config import published
from gptjax.models import registry
from gptjax.models.packing import quantized
from gptjax.models.params import abstract_params, random_params, repacked, weights_by_path
from pallas_kernels.matvec import row_sm90 as R

S, RULE = R.Settings, R.settings_of
STEPS = 24


def model_of(name, kind):
    config = published(name).with_one_layer()
    if kind == "mxfp4":
        config = dataclasses.replace(config, mxfp4="all")
    else:
        config = quantized(config, weights_by_path(abstract_params(registry.build(config))), kind)
    model = registry.build(config, dtype=jnp.bfloat16)
    return model, repacked(model, random_params(model))


def kernels(directory):
    found = []
    for path in glob.glob(directory + "/**/*.xplane.pb", recursive=True):
        for plane in jax.profiler.ProfileData.from_file(path).planes:
            if "GPU" in plane.name:
                for line in plane.lines:
                    if "Stream" in line.name:
                        found += [(e.start_ns, e.duration_ns, e.name) for e in line.events]
    return sorted(found)


def measure(label, model, params):
    def step(params, token, position, cache):
        hidden, cache = model.apply({"params": params}, token, position, cache)
        logits = model.apply({"params": params}, hidden[:, -1], method="head")
        return jnp.argmax(logits, -1).astype(jnp.int32)[:, None], position + 1, cache

    step = jax.jit(step, donate_argnums=(1, 2, 3))
    cache = registry.create_cache(model, batch=1, max_length=2304)
    cache = dataclasses.replace(cache, lengths_B=jnp.full((1,), 2048, jnp.int32))
    state = (jnp.zeros((1, 1), jnp.int32), jnp.full((1, 1), 2048, jnp.int32), cache)
    begin = time.time()
    for _ in range(8):
        state = step(params, *state)
    jax.block_until_ready(state)
    compiled = time.time() - begin
    begin = time.perf_counter()
    for _ in range(48):
        state = step(params, *state)
    jax.block_until_ready(state)
    wall = (time.perf_counter() - begin) / 48 * 1e6
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            for _ in range(STEPS):
                state = step(params, *state)
            jax.block_until_ready(state)
        found = kernels(directory)
    names = [name for *_, name in found]
    per = len(found) // STEPS
    if per == 0:
        print(
            label,
            f"wall {wall:.1f} us; {len(found)} kernels seen: {collections.Counter(names).most_common(3)}",
            flush=True,
        )
        return
    found = found[len(found) - per * (STEPS - 4) :]
    line = []
    for place in range(per):
        mine = found[place::per]
        durations = sorted(duration for _, duration, _ in mine)
        line.append(f"{mine[0][2][:14]} {durations[len(durations) // 2] / 1e3:.1f}")
    print(f"{label}: wall {wall:.1f}, compiled {compiled:.1f} s | " + ", ".join(line), flush=True)


G, D, Q, O, H = (14336, 4096, 2), (4096, 14336, 1), (6144, 4096, 1), (4096, 4096, 1), (128256, 4096, 1)
VARIANTS = {
    "rule": {},
    "B": {G: S(2, 7, early=False), D: S(8, 2), Q: S(4, 3), O: S(4, 2), H: S(1, 4, early=False)},
    "C": {
        G: S(2, 7, ahead=2, early=False),
        D: S(14, 2, early=False),
        Q: S(8, 3, early=False),
        O: S(12, 2),
        H: S(1, 4, ahead=2),
    },
    "D": {G: S(1, 8, ahead=2), D: S(8, 2, ahead=3), Q: S(6, 4), O: S(8, 1), H: S(1, 16)},
    "E": {G: S(1, 12), D: S(8, 1, ahead=3), Q: S(8, 1), O: S(16, 1), H: S(1, 20)},
}
PLAN = [
    ("llama-3.1-8b", "Q4_K", ["rule", "B", "C", "D", "E"]),
    ("llama-3.1-8b", "mxfp4", ["rule", "B", "D"]),
    ("qwen2.5-7b", "Q4_K", ["rule"]),
]
for name, kind, variants in PLAN:
    if time.time() - BEGIN > SECONDS - 8:
        break
    model, params = model_of(name, kind)
    for variant in variants:
        if time.time() - BEGIN > SECONDS - 5:
            print("out of time", flush=True)
            break
        table = VARIANTS[variant]
        R.settings_of = lambda o, i, m=1, matrices=None, table=table: (
            table.get((o, i, matrices or m)) or RULE(o, i, matrices or m)
        )
        try:
            measure(f"{name} {kind} {variant}", model, params)
        except Exception as error:
            print(name, kind, variant, "FAILED", type(error).__name__, str(error)[:200].replace("\n", " "), flush=True)
