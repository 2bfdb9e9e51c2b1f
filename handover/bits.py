import numpy as np, jax, jax.numpy as jnp, sys
import flax.linen as nn
print(jax.__version__)
rng=np.random.default_rng(0)
sizes=[1,2,3,4,8,16,32,64,128,512]
def show(name,f,x):
    outs=[np.asarray(jax.jit(f)(jnp.asarray(x[:n])))[0] for n in sizes]
    ref=outs[1]
    print(f"{name:34s}", " ".join(f"{n}:{'=' if np.array_equal(o,ref) else 'X'}" for n,o in zip(sizes,outs)),flush=True)
for I,O in ((256,768),(256,1024),(1024,256),(768,2304),(768,3072),(3072,768),(2880,512),(256,8192)):
    x=rng.standard_normal((512,I)).astype(np.float32); w=rng.standard_normal((I,O)).astype(np.float32); wt=jnp.asarray(w.T.copy()); w=jnp.asarray(w)
    show(f"[in,out] {I}x{O}",lambda x:jnp.dot(x,w),x)
    show(f"[out,in] {I}x{O}",lambda x:jax.lax.dot_general(x,wt,(((1,),(1,)),((),()))),x)
for D in (256,768,2880):
    x=rng.standard_normal((512,D)).astype(np.float32)
    def ln(x):
        c=x-x.mean(-1,keepdims=True); return c*jax.lax.rsqrt(jnp.square(c).mean(-1,keepdims=True)+1e-5)
    show(f"LayerNorm {D}",ln,x)
    show(f"RMSNorm {D}",lambda x:x*jax.lax.rsqrt(jnp.square(x).mean(-1,keepdims=True)+1e-5),x)
    show(f"LayerNorm map {D}",lambda x:jax.lax.map(lambda r:ln(r[None])[0],x),x)
    show(f"gelu {D}",lambda x:jax.nn.gelu(x),x)
    show(f"softmax {D}",lambda x:jax.nn.log_softmax(x),x)
