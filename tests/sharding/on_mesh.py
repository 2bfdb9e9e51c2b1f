"""Models of tests on meshes, with the weights that they have on one device."""

from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

import gptjax
from gptjax.checkpoints import weights
from gptjax.models import shards
from gptjax.models.params import Params, abstract_params
from gptjax.models.registry import Model
from gptjax.sharding.mesh import AXES, as_mesh
from gptjax.sharding.share import share_of


def sizes(*numbers: int) -> dict[str, int]:
    """Of data, tensor and expert."""
    return dict(zip(AXES, numbers, strict=True))


def placed(model: Model, params: Params, mesh: dict[str, int], **how: Any) -> tuple[Model, Params]:
    """The model of a device of a mesh, and its weights in parts."""
    own = shards.divided(model, share_of(model.config, as_mesh(mesh), dtype=model.dtype, **how))
    whole = ((path, np.asarray(leaf)) for path, leaf in weights.flatten(params).items())
    return own, weights.place(whole, abstract_params(model), put=shards.putter(own, model))


def on_mesh(lm: gptjax.LanguageModel, mesh: dict[str, int], **options: Any) -> gptjax.LanguageModel:
    """A loaded model, divided."""
    model, params = placed(lm.model, lm.params, mesh)
    return gptjax.LanguageModel(
        model, params, tokenizer=lm.tokenizer, defaults=lm.defaults, **{"max_length": lm.max_length} | options
    )


def bytes_by_device(tree: Any) -> dict[jax.Device, int]:
    """The bytes of all arrays that each device has."""
    found: dict[jax.Device, int] = {}
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            found[shard.device] = found.get(shard.device, 0) + shard.data.nbytes
    return found


def of_all(leaf: jax.ShapeDtypeStruct, spec: P, model: Model) -> jax.ShapeDtypeStruct:
    """The shape of all devices' parts of a weight."""
    assert model.own.mesh is not None
    entries = [*spec, *[None] * (len(leaf.shape) - len(spec))]
    names = [(entry,) if isinstance(entry, str) else entry or () for entry in entries]
    counts = [int(np.prod([model.own.mesh.shape[name] for name in each])) for each in names]
    return jax.ShapeDtypeStruct(tuple(size * count for size, count in zip(leaf.shape, counts, strict=True)), leaf.dtype)
