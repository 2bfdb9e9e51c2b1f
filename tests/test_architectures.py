"""Every architecture that a config can name has all that it needs: a model, stages, tables, taps."""

from typing import Any

import pytest

import convert.tables
from gptjax.config import MODEL_TYPES, PUBLISHED, config_from_json
from gptjax.diagnostics.transformers_comparison import taps
from gptjax.models import registry
from gptjax.models.stages import stages

CONFIGS = {config.to_json()["model_type"]: config for config in PUBLISHED.values()}


def test_every_model_type_has_a_published_size():
    assert CONFIGS.keys() == MODEL_TYPES.keys()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_architecture_is_whole(model_type):
    config: Any = CONFIGS[model_type]
    assert type(config) is MODEL_TYPES[model_type]
    assert config_from_json(config.to_json()) == config
    model = registry.build(config)
    assert model.config is config
    assert convert.tables.table(config).rules
    assert [tap.stage for tap in taps(config)] == stages(config)
