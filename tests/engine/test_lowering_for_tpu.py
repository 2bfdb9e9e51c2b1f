"""All that an engine runs lowers for TPUs, alone and divided, without any of our kernels. It never ran on one."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.config import PUBLISHED, GptOssConfig, ModelConfig
from gptjax.engine.executor import Executor
from gptjax.engine.flat_params import FlatParams
from gptjax.engine.programs import Slots
from gptjax.engine.settings import Features
from gptjax.models import registry, shards
from gptjax.models.params import abstract_params
from gptjax.models.registry import Model
from gptjax.scheduling.policy import Policy
from gptjax.sharding.mesh import planned
from gptjax.sharding.share import Share, share_of
from pallas_kernels import dispatch
from tests.sharding.on_mesh import of_all

MESH = {"data": 2, "tensor": 2, "expert": 2}
POLICY = Policy(slots=2, chunk=64, steps=4, smallest_call=64, smallest_rows=2)
LEVELS = Features(draws=True), Features.everything()  # nothing branches, as the host would wait for the device
PROGRAMS = {"copy_pages", "set_counts", "prefill", "keep_logits", "sample", "advance", "decode", "marker"}


def _config(name: str) -> ModelConfig:
    """A published size with one layer of each kind."""
    config = PUBLISHED[name]
    if isinstance(config, GptOssConfig):
        return dataclasses.replace(config, num_layers=2, windows=config.windows[:2])
    return config.with_one_layer()


@pytest.fixture
def tpu(monkeypatch):
    """What the project asks of a TPU. Pools are never made, only their shapes."""
    device = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite", compute_capability="")
    with monkeypatch.context() as patched:
        patched.setattr(jax, "devices", lambda: [device])
        found = dispatch.preferred.__wrapped__()
    monkeypatch.setattr(dispatch, "preferred", lambda: found)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    make = registry.create_pools
    monkeypatch.setattr(registry, "create_pools", lambda *given, **how: jax.eval_shape(lambda: make(*given, **how)))
    monkeypatch.setattr(Share, "sharding", lambda *_: None)


@pytest.mark.parametrize("mesh", [None, MESH])
@pytest.mark.parametrize("name", ["gpt2", "gpt-oss-20b", "llama-3.1-8b", "qwen2.5-0.5b", "qwen3-0.6b"])
def test_steps_lower_for_tpus(tpu, name, mesh):
    model = registry.build(_config(name), dtype=jnp.bfloat16)
    if mesh is not None:
        model = shards.divided(model, share_of(model.config, planned(mesh), dtype=jnp.bfloat16))
    params = abstract_params(model)
    if mesh is not None:
        specs = shards.weight_specs(model, params)
        params = jax.tree.map(lambda leaf, spec: _at(of_all(leaf, spec, model), spec, model), params, specs)
    pages = [9] * len(set(model.config.windows))
    policy = dataclasses.replace(POLICY, shards=model.own.rows_parts)
    executor = Executor(model, params, policy=policy, pages=pages, max_length=256, levels=LEVELS)
    texts: dict[str, str] = {}

    def export(program: Any, *arguments: Any) -> Any:
        exported = jax.export.export(program, platforms=["tpu"])(*(_shapes(each, model) for each in arguments))
        texts[program.__name__] = text = exported.mlir_module()
        assert "custom_call" not in text, program.__name__
        assert exported.nr_devices == (1 if mesh is None else 8)
        return jax.tree.unflatten(exported.out_tree, exported.out_avals)

    executor._call = export
    executor._run_all(executor._all_sizes())
    assert texts.keys() == PROGRAMS
    for program in ("prefill", "advance", "decode"):
        assert ("all_gather" in texts[program]) == (mesh is not None)


def _at(leaf: Any, spec: P, model: Model) -> Any:
    """The shape of a leaf, with how it is divided."""
    mesh = model.own.mesh
    sharding = None if mesh is None else NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _shapes(argument: Any, model: Model) -> Any:
    """The shapes of an argument, unless it is a static one or has only shapes."""
    if isinstance(argument, int | FlatParams | type(model)):
        return argument
    specs = jax.tree.map(lambda _: P(), argument)
    if isinstance(argument, Slots) and model.own.mesh is not None:
        specs = dataclasses.replace(specs, cache=model.own.cache_specs(argument.cache))
    return jax.tree.map(lambda leaf, spec: _at(leaf, spec, model), argument, specs)
