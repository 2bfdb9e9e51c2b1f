import dataclasses, re, sys, collections
import jax, jax.numpy as jnp, numpy as np
from gptjax.config import PUBLISHED
from gptjax.engine import steps
from gptjax.models import registry
from gptjax.models.params import random_params
import gptjax; print(gptjax.__file__)
for name in ("gpt2","gpt-oss-20b"):
    for layers in (2,4):
        kw=dict(num_layers=layers, vocab_size=64)
        c=PUBLISHED[name]
        if name!="gpt2":
            kw=dict(num_layers=layers, vocab_size=64, layer_types=c.layer_types[:layers]) if hasattr(c,"layer_types") else dict(num_layers=layers,vocab_size=64, windows=c.windows[:layers]) if "windows" in {f.name for f in dataclasses.fields(c)} else kw
        try:
            config=dataclasses.replace(c, **kw)
            model=registry.build(config,dtype=jnp.bfloat16,implementation="mosaic")
            params=jax.eval_shape(lambda: random_params(model))
            state=jax.eval_shape(lambda: steps.init_state(model,batch=1,max_length=512))
            tok=jax.ShapeDtypeStruct((1,),jnp.int32); 
            t=steps.advance.trace(model,params,state,tok,jax.ShapeDtypeStruct((1,),jnp.bool_ if sys.argv[1]=="main" else jnp.int32))
            text=t.lower(lowering_platforms=("cuda",)).as_text()
            ops=collections.Counter(re.findall(r"stablehlo\.(\w+)",text))
            print(name,layers,sum(ops.values()),dict(ops.most_common(40)))
            open(f"/tmp/ops_{sys.argv[1]}_{name}_{layers}.txt","w").write(re.sub(r'backend_config = "[^"]*"',"",text))
        except Exception as e: print(name,layers,type(e),str(e)[:300])
