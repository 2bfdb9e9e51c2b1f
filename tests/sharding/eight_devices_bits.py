"""An engine on a mesh: what it draws, and that no bit of it depends on the load. Run by `test_on_eight_devices.py`."""

import jax
import numpy as np
import pytest

from gptjax.engine.engine import Engine
from gptjax.engine.request import Request, SamplingParams
from gptjax.errors import RequestError
from tests.compilations import compilations
from tests.shallow import shallow
from tests.sharding.on_mesh import on_mesh, placed

PROMPTS = ["Once upon a time there was", "The wolf"]
GREEDY = {"max_tokens": 8, "temperature": 0}
TOLERANCE = 1e-4

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="run by test_on_eight_devices.py")


@pytest.mark.thorough  # eight_devices_data.py has the plans of an engine, eight_devices.py such experts
def test_an_engine_on_a_mesh_draws_what_one_on_a_device_draws():
    lm = shallow("gpt-oss-tales", max_length=128)
    expected = lm.generate(PROMPTS, **GREEDY)
    mesh = on_mesh(lm, {"tensor": 2, "expert": 2})
    together = mesh.generate(PROMPTS, **GREEDY)
    assert [each.token_ids for each in together] == [each.token_ids for each in expected]
    alone = mesh.generate(PROMPTS[1], **GREEDY)
    assert (alone.token_ids, alone.logprobs) == (together[1].token_ids, together[1].logprobs)
    ids = lm.tokenizer.encode("The wolf was in the wood.")
    assert np.abs(mesh.logits(ids) - lm.logits(ids)).max() < TOLERANCE
    for call in (mesh.init_state, lambda: mesh.activations(ids)):
        with pytest.raises(RequestError, match="is for a model on one device: load it without a mesh"):
            call()
    mesh.close()


@pytest.mark.thorough
def test_after_warming_up_nothing_is_compiled():
    lm = shallow("gpt2-tales")
    sizes = {"batch": 2, "max_length": 128, "chunk": 64, "steps_per_dispatch": 2}
    engine = Engine(*placed(lm.model, lm.params, {"data": 2, "tensor": 2}), **sizes)
    with compilations() as compiled:
        engine.warm_up()
    assert compiled
    with compilations() as compiled:
        engine.add(Request((1, 2, 3), 5, SamplingParams(seed=0)))
        drawn = [token for _ in range(9) for token in engine.step()]
    assert len(drawn) >= 4 and not compiled
