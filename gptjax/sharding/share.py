"""A device's share of a model: how much of each axis it has, and with whom it adds up results.

All devices of a mesh run the same program, under `jax.shard_map`: the model with the sizes of one share. So every
kernel works on local shapes as if it were alone. The devices meet where a sum goes over a divided axis: after a
block's attention and after its MLP or experts (`PartialSum.across`), in the embedding, and after the head.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.config import GptOssConfig, ModelConfig
from gptjax.config.quantization import packs
from gptjax.errors import RequestError
from gptjax.layers.cache import KVCache
from gptjax.sharding.mesh import AXES, DATA, EXPERT, TENSOR
from gptjax.support.quoting import quoted
from pallas_kernels.formats.fragments import TILE
from pallas_kernels.formats.mxfp4 import BLOCK
from pallas_kernels.moe.runs import unit_of_parts

# Which axes of the mesh divide which axis of the model, by the letters of `gptjax.axes`. Key/value heads go with the
# query heads that share them. Rows are always divided over `data`, and what is not here not at all.
RULES: Final[Mapping[str, tuple[str, ...]]] = {
    "N": (TENSOR,),
    "F": (TENSOR,),
    "V": (TENSOR,),
    "E": (EXPERT,),
}


@dataclasses.dataclass(frozen=True)
class Share:
    """The sizes that one device has, and the mesh's axes that divide each. Without a mesh: all of a model."""

    num_heads: int  # N
    num_kv_heads: int  # K: if there are fewer than devices, several have the same one
    mlp_width: int  # F: rounded up, with zeros
    vocab_size: int  # V: rounded up, with zeros
    num_experts: int  # E; 0 for a dense model
    mesh: Mesh | AbstractMesh | None = None
    rules: tuple[tuple[str, tuple[str, ...]], ...] = ()  # RULES, or others
    divides_rows: bool = True  # over the mesh's axis data; otherwise all devices along it compute the same rows

    @classmethod
    def whole(cls, config: ModelConfig) -> "Share":
        """All of a model, on one device."""
        return cls(config.num_heads, config.num_kv_heads, config.mlp_width, config.vocab_size, experts_of(config))

    def axes(self, letter: str) -> tuple[str, ...]:
        """The mesh's axes that divide an axis of the model; none of size 1."""
        shape = {} if self.mesh is None else self.mesh.shape
        return tuple(name for name in dict(self.rules).get(letter, ()) if shape.get(name, 1) > 1)

    def parts(self, letter: str) -> int:
        """Into how many parts an axis of the model is divided."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[name] for name in self.axes(letter))

    @property
    def rows_parts(self) -> int:
        """Into how many parts the rows of a call are divided."""
        return 1 if self.mesh is None or not self.divides_rows else int(self.mesh.shape[DATA])

    def rows_of(self, rows: int) -> int:
        """The most rows that a device has of a number of rows."""
        return -(-rows // self.rows_parts)

    @property
    def by_row(self) -> P:
        """How an array is divided whose first axis are rows, or a part's numbers after another's."""
        return P(DATA) if self.rows_parts > 1 else P()

    def alone(self) -> "Share":
        """The same sizes for a program that meets no other device: for shapes."""
        return dataclasses.replace(self, mesh=None, rules=())

    def sharding(self, spec: P | None = None) -> NamedSharding | None:
        """Where an array is put, by default whole on all devices; None without a mesh: on the default device."""
        return None if self.mesh is None else NamedSharding(self.mesh, P() if spec is None else spec)

    def run(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """The function, run by all devices of the mesh on their parts of its arguments."""
        # What is returned as whole is the same on all devices; `check_vma` cannot see this of kernels.
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def made(self, make: Callable[[], Any], specs: Callable[[Any], Any]) -> Any:
        """What a function makes on each device as its part of the result.

        Args:
          specs: gives the partition of each array of a result.
        """
        out_specs = specs(jax.eval_shape(make))
        return jax.jit(self.run(make, (), out_specs))()

    def cache_specs(self, cache: KVCache) -> KVCache:
        """How a cache is divided: pools by rows and heads, and tables and lengths by rows."""
        rows = DATA if self.rows_parts > 1 else None
        specs = jax.tree.map(lambda _: P(rows), cache)
        pools = P(rows, self.axes("N") or None)
        peers = jax.tree.map(lambda _: P(AXES), cache.peers)  # each device its own
        k, v = jax.tree.map(lambda _: pools, (cache.k, cache.v))
        return dataclasses.replace(specs, k=k, v=v, peers=peers)


def share_of(
    config: ModelConfig,
    mesh: Mesh | AbstractMesh,
    *,
    dtype: Any,
    rules: Mapping[str, str | tuple[str, ...] | None] | None = None,
) -> Share:
    """What each device of a mesh has of a model.

    Args:
      mesh: with all axes, as `as_mesh` returns it.
      dtype: of the computation.
      rules: replaces entries of `RULES`: axes of the mesh by letter. None divides nothing.

    Raises:
      RequestError: heads or experts do not divide into that many parts; packed weights of a GGUF file; or unknown
        rules.
    """
    share = dataclasses.replace(Share.whole(config), mesh=mesh, rules=tuple(_rules(rules).items()))
    if config.types:
        raise RequestError(
            "the packed weights of a GGUF file cannot be divided among devices: leave out the mesh, or take a "
            "checkpoint in Hugging Face's format"
        )
    heads, kv_heads = config.num_heads, config.num_kv_heads
    _check("query heads", heads, share, "N", [n for n in _divisors(heads) if not (kv_heads % n and n % kv_heads)])
    if isinstance(config, GptOssConfig):
        _check("experts", config.num_experts, share, "E", _divisors(config.num_experts))
    n = share.parts("N")
    if packs(config.mxfp4, "linear") and (heads // n * config.head_width) % BLOCK:
        fit = [n for n in _divisors(heads) if (heads // n * config.head_width) % BLOCK == 0]
        _check(f"heads of {config.head_width}, packed in blocks of {BLOCK},", heads, share, "N", fit)
    return dataclasses.replace(
        share,
        num_heads=heads // n,
        num_kv_heads=max(1, kv_heads // n),
        mlp_width=_rounded(config.mlp_width, share.parts("F"), _unit(config, dtype)),
        vocab_size=_rounded(config.vocab_size, share.parts("V"), TILE),
        num_experts=experts_of(config) // share.parts("E"),
    )


def experts_of(config: ModelConfig) -> int:
    """E, or 0."""
    return config.num_experts if isinstance(config, GptOssConfig) else 0


def _unit(config: ModelConfig, dtype: Any) -> int:
    """What a share of F is a multiple of. If all of F fits the kernels for Hopper, its parts must, too."""
    if jax.numpy.dtype(dtype) == jax.numpy.bfloat16 and config.mlp_width % TILE == 0:
        return unit_of_parts(config.mlp_width) if experts_of(config) else TILE
    return BLOCK if config.mxfp4 != "none" else 1


def _rounded(size: int, parts: int, unit: int) -> int:
    return size if parts == 1 else -(-size // (parts * unit)) * unit


def _check(what: str, size: int, share: Share, letter: str, fit: list[int]) -> None:
    if (parts := share.parts(letter)) not in fit:
        by = " · ".join(share.axes(letter))
        raise RequestError(
            f"the model's {size} {what} cannot be divided among {parts} devices ({by}); "
            f"sizes that work: {', '.join(map(str, fit))}"
        )


def _divisors(size: int) -> list[int]:
    return [n for n in range(1, size + 1) if size % n == 0]


def _axes(given: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


def _rules(given: Mapping[str, str | tuple[str, ...] | None] | None) -> dict[str, tuple[str, ...]]:
    found = dict(RULES)
    for letter, axes in (given or {}).items():
        if letter not in RULES or not set(_axes(axes)) <= {TENSOR, EXPERT}:
            raise RequestError(
                f"no rule can say that {quoted(letter)} is divided over {quoted(axes)}: rules are for "
                f"{', '.join(RULES)}, and say {TENSOR}, {EXPERT}, both, or None"
            )
        found[letter] = _axes(axes)
    if both := set(found["E"]) & set(found["F"]):
        raise RequestError(f"the rules divide both E and F over {both.pop()}: an expert's width needs another axis")
    return found
