"""Random GPT-OSS checkpoints with the models that they are loaded as."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from gptjax.config import config_from_json
from gptjax.models import registry
from gptjax.models.params import Params
from gptjax.models.registry import Model
from tests.oracles import gpt_oss_numpy, gpt_oss_ours, gpt_oss_random
from tests.oracles.gpt_oss_random import Checkpoint


class Case(NamedTuple):
    """A checkpoint, and what it is loaded as."""

    checkpoint: Checkpoint
    model: Model
    params: Params

    def oracle(self, ids: Sequence[int]) -> gpt_oss_numpy.Outputs:
        return gpt_oss_numpy.forward(self.checkpoint.dense, self.checkpoint.config, ids)


def make_case(dtype: Any = jnp.float32, **changes: Any) -> Case:
    """A checkpoint of weights rounded to `dtype`, with packed experts."""
    checkpoint = gpt_oss_random.checkpoint(dtype=dtype, **changes)
    config = config_from_json({**checkpoint.config, "quantization_config": gpt_oss_random.QUANTIZATION})
    return Case(checkpoint, registry.build(config, dtype=dtype), gpt_oss_ours.params(checkpoint.packed, dtype))
