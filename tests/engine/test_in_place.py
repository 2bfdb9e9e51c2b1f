"""The programs of the executor update the pools in place. Optimised as users' are: it decides what is copied."""

import jax
import numpy as np
import pytest

from gptjax.engine import programs
from gptjax.engine.executor import Executor
from gptjax.engine.flat_params import FlatParams
from gptjax.engine.settings import Features, settings_of
from gptjax.models import registry
from tests.engine.test_engine import CONFIG, made_params
from tests.engine.test_executor import POLICY
from tests.thinned import thinned


@pytest.mark.parametrize("dtype", thinned(["float32", "bfloat16", "fp8"], "bfloat16", "fp8"))
@pytest.mark.parametrize("program", ["prefill", "advance", "decode", "copy_pages"])
def test_pages_are_updated_in_place(dtype, program):
    """Nothing of the size of a layer's pool is copied or converted in passing. In "fp8" is the pool alone."""
    if dtype == "bfloat16" and jax.default_backend() == "cpu" and jax.__version_info__ < (0, 11):
        pytest.skip("before JAX 0.11, a CPU computes with a converted pool")
    dtype, kept = ("float32", dtype) if dtype == "fp8" else (dtype, None)
    model = registry.build(CONFIG, dtype=dtype, cache_dtype=kept)
    params = FlatParams.of(jax.tree.map(lambda x: x.astype(dtype), made_params()))
    executor = Executor(model, params, policy=POLICY, pages=[200], max_length=300)
    slots = executor._slots
    rows = np.zeros((4, programs.ROW_FIELDS + 2), np.int32)
    settings = settings_of([None] * 4, CONFIG.vocab_size, Features())
    arguments = {
        "prefill": (model, params, slots, np.zeros(32 + 3 + 4 * 3, np.int32), 32, 3),
        "advance": (model, params, slots, np.zeros(4, np.int32), rows),
        "decode": (model, params, slots, rows, settings, 2),
        "copy_pages": (slots, np.zeros(17, np.int32), 0),
    }[program]
    pools = jax.tree.leaves(slots.cache.k)
    pool = pools[0]
    compiled = getattr(programs, program).lower(*arguments).compile()
    others = 0 if jax.default_backend() == "cpu" else 1 << 20  # all scores, and what products work in
    assert compiled.memory_analysis().temp_size_in_bytes < pool.size * pool.dtype.itemsize + others
    before = [x.unsafe_buffer_pointer() for x in pools]
    after = getattr(programs, program)(*arguments)
    (found,) = (each for each in (after if isinstance(after, tuple) else (after,)) if isinstance(each, programs.Slots))
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(found.cache.k)] == before
    assert pool.is_deleted()
