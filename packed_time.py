"""Times the products of one row, variant by variant. Prints as it goes; stops after SECONDS."""
import sys, time
import jax, jax.numpy as jnp, numpy as np
from pallas_kernels.formats.ggml.weight import Quantized
from pallas_kernels.formats.mxfp4 import MXFP4
from pallas_kernels.matvec import packed_sm90 as old, row_sm90 as R, repacked

BEGIN, SECONDS = time.time(), float(sys.argv[1])
WHAT = sys.argv[2].split(",") if len(sys.argv) > 2 else None
S = R.Settings

def weight(kind, O, I):
    if kind == "mxfp4":
        k = jax.random.split(jax.random.key(0))
        return repacked(MXFP4(jax.random.bits(k[0], (O, I // 32, 16), jnp.uint8), jnp.full((O, I // 32), 120, jnp.uint8)))
    return repacked(Quantized.random(jax.random.key(0), (O, I), kind))

@jax.jit
def another(w, i):
    return jax.tree.map(lambda a: a ^ (i.astype(a.dtype) & 7) if a.ndim >= 4 else a + 0, w)

def measure(name, make, O, I, kind):
    w = weight(kind, O, I)
    n = max(2, min(64, int(450e6 // w.nbytes) + 1))
    ws = [another(w, jnp.uint32(i)) for i in range(n)]
    passes = max(1, 200 // n) if n < 64 else 3
    x = jax.random.normal(jax.random.key(1), (1, I), jnp.bfloat16)
    ref = None
    for label, f in make:
        if time.time() - BEGIN > SECONDS:
            print("out of time"); return
        try:
            g = jax.jit(lambda x, ws: [f(x, w) for _ in range(passes) for w in ws])
            out = jax.block_until_ready(g(x, ws))
            got = np.asarray(out[0].astype(jnp.float32))
            got = (got.sum(0) if got.ndim == 3 else got).reshape(-1)
            if got.size != O: got = None
            if ref is None and got is not None: ref = got
            err = "" if got is None else f"{np.abs(got - ref).max() / np.abs(ref).max():.1e}"
            times = []
            for _ in range(5):
                t = time.perf_counter(); jax.block_until_ready([g(x, ws) for _ in range(3)]); times.append(time.perf_counter() - t)
            us = sorted(times)[2] / 3 / passes / n * 1e6
            print(f"{kind:6} {name:8} {label:34} {us:6.2f} us  {w.nbytes / us / 1e6:5.2f} TB/s  {err}", flush=True)
        except Exception as e:
            print(kind, name, label, "FAILED", str(e).splitlines()[0][:150], flush=True)

def plain(*a, **k):
    s = S(*a, **k)
    return (f"row {s.share} {s.strips} ahead {s.ahead} {'early' if s.early else ''}", lambda x, w: R.product(x, [w], s))
def gated(*a, **k):
    s = S(*a, **k)
    return (f"gated {s.share} {s.strips} ahead {s.ahead} {'early' if s.early else ''}", lambda x, w: R.gated(x, [w], s))
OLD = ("old", lambda x, w: old._parts(x, w, splits=old.splits_of(*w.shape)))

CASES = [
    ("gate_up", 28672, 4096, [OLD, gated(2, early=False), gated(2), gated(2, early=False, ahead=2), gated(2, strips=2, early=False), gated(4, early=False), gated(1, strips=2), plain(2, strips=2, early=False)]),
    ("down", 4096, 14336, [OLD, plain(8), plain(8, ahead=3), plain(16), plain(16, early=False), plain(8, early=False, ahead=2)]),
    ("qkv", 6144, 4096, [OLD, plain(8), plain(4), plain(8, early=False), plain(4, ahead=2), plain(16)]),
    ("out", 4096, 4096, [OLD, plain(8), plain(16), plain(4), plain(8, early=False)]),
    ("head", 128256, 4096, [OLD, plain(1, strips=4, early=False), plain(1, strips=4), plain(1, strips=4, early=False, ahead=2), plain(2, strips=2)]),
    ("qdown", 3584, 18944, [OLD, plain(8), plain(8, ahead=3), plain(16)]),
    ("qgateup", 37888, 3584, [OLD, gated(2, early=False), gated(2)]),
]
for kind in ("Q4_K", "mxfp4"):
    for name, O, I, make in CASES:
        if WHAT is None or name in WHAT or kind + name in WHAT:
            measure(name, make, O, I, kind)
