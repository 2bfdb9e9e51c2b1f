"""Every architecture that a config can name has all that it needs: a model, stages, tables, taps."""

import math
from typing import Any

import pytest

from convert.matching import names_of
from convert.tables import table
from gptjax.checkpoints.weights import flatten
from gptjax.config import MODEL_TYPES, PUBLISHED, config_from_json
from gptjax.diagnostics.transformers_comparison import taps
from gptjax.models import registry
from gptjax.models.params import abstract_params, weights_by_path
from gptjax.models.stages import stages
from pallas_kernels.formats.mxfp4 import MXFP4

CONFIGS = {config.to_json()["model_type"]: config for config in PUBLISHED.values()}


def test_every_model_type_has_a_published_size():
    assert CONFIGS.keys() == MODEL_TYPES.keys()


def _numbers(model: registry.Model) -> int:
    """The number of parameters that are not packed."""
    leaves = weights_by_path(abstract_params(model)).values()
    return sum(leaf.size for leaf in leaves if not isinstance(leaf, MXFP4))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_architecture_is_whole(model_type):
    config: Any = CONFIGS[model_type]
    assert type(config) is MODEL_TYPES[model_type]
    assert config_from_json(config.to_json()) == config
    model = registry.build(config)
    assert model.config is config
    numbers = 0
    for path, target in flatten(abstract_params(model)).items():
        _, transform = names_of(table(config), path)  # of the tensors that fill it
        if transform.dtypes != ("U8",):
            numbers += sum(math.prod(shape) for shape in transform.source_shapes(tuple(target.shape)))
    assert numbers == _numbers(model)
    assert [tap.stage for tap in taps(config)] == stages(config)
