"""Parameters as the jitted steps are given them: one tuple, not dicts in dicts."""

import dataclasses

import jax

from gptjax.models.params import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class FlatParams:
    """A model's parameters, flattened once.

    JAX flattens the arguments of each call, and dicts, whose keys it sorts, take it longer than a tuple. On a CPU, of
    the host's 0.50 ms a call with the 580 arrays of GPT-2 XL 0.19 ms go into that; of 0.09 ms with GPT-2's 148, 0.03.
    """

    leaves: tuple[jax.Array, ...]
    tree: jax.tree_util.PyTreeDef = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, params: "AnyParams") -> "FlatParams":
        """The same parameters; themselves, if they are flat."""
        if isinstance(params, FlatParams):
            return params
        leaves, tree = jax.tree.flatten(params)
        return cls(tuple(leaves), tree)

    def nested(self) -> Params:
        """As the model takes them."""
        params: Params = jax.tree.unflatten(self.tree, self.leaves)
        return params


AnyParams = Params | FlatParams
