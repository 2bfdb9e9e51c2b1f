"""The jitted programs that plans are made of, and the state that they pass along.

A plan's numbers reach a program as one int32 array, because the host sends each array to the device separately. The
model is a static argument, so two models of one configuration share compiled code.

On a mesh, all devices run each program as a whole, on their shares of weights and pools. Along its axis `data`, each
has slots, pages and rows of its own, and its part of all arrays that are about these (`engine.numbers`). Everything
else is the same on all devices, so those with the same rows draw the same tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from gptjax.engine import sampling
from gptjax.engine.flat_params import FlatParams
from gptjax.layers.cache import KVCache
from gptjax.models import shards
from gptjax.models.registry import Model
from gptjax.sharding.share import Share
from pallas_kernels import same_bits
from pallas_kernels.pages import Tiles

ROW_FIELDS = 5  # of a row's numbers before the given tokens: slot, position, given, steps, feeds

_jit = partial(jax.jit, compiler_options=same_bits.COMPILER)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """What the device has of B requests. A pytree; the programs donate it, so use what they return."""

    cache: KVCache
    logits_BV: jax.Array  # float32: for the token after each slot's last
    # int32: what `sampling.sample` counts. Undefined for a slot whose request has no penalties.
    counts_BV: jax.Array
    share: Share | None = dataclasses.field(default=None, metadata={"static": True})  # of each device, on a mesh


_Program = Callable[..., Any]
# What a program returns:
_SLOTS: Final = "slots"
_ROWS: Final = "rows"  # arrays whose first axis are rows
_STEPS: Final = "steps"  # arrays whose second axis are rows


def _by_all_devices(*returns: str, alike: int | None = None) -> Callable[[_Program], _Program]:
    """Lets all devices of a mesh run a program, if its slots are on one. What else it takes is divided by row.

    Args:
      returns: what the program returns, of what is above.
      alike: the index of an argument that is the same for all devices.
    """

    def decorated(program: _Program) -> _Program:
        @functools.wraps(program)
        def run(*arguments: Any) -> Any:
            slots = next(each for each in arguments if isinstance(each, Slots))
            if slots.share is None or slots.share.mesh is None:
                return program(*arguments)
            model = next((each for each in arguments if isinstance(each, nn.Module)), None)
            rows = slots.share.by_row
            specs = {_SLOTS: _specs(slots, slots.share, model), _ROWS: rows, _STEPS: P(None, *rows)}
            static = [isinstance(each, int | nn.Module) for each in arguments]

            def on_each(*dynamic: Any) -> Any:
                left = iter(dynamic)
                return program(*(each if fixed else next(left) for each, fixed in zip(arguments, static, strict=True)))

            dynamic = [index for index, fixed in enumerate(static) if not fixed]
            in_specs = tuple(
                P() if index == alike else _specs(arguments[index], slots.share, model) for index in dynamic
            )
            out_specs = tuple(specs[each] for each in returns)
            out_specs = out_specs if len(out_specs) > 1 else out_specs[0]
            dynamic = [arguments[index] for index in dynamic]
            return slots.share.run(on_each, in_specs, out_specs)(*dynamic)

        return run

    return decorated


def as_divided(shapes: Any, like: Slots, by_row: jax.sharding.Sharding) -> Any:
    """The shapes of what a program returns on a mesh, with how it is divided: slots like others, all else by row.

    Arrays whose first axis are steps stay as they are: no program takes them.
    """

    def divided(shape: Any) -> Any:
        if isinstance(shape, Slots):
            return jax.tree.map(lambda each, other: _shape(each, other.sharding), shape, like)
        if isinstance(shape, sampling.Sampled) and shape.token_B.ndim > 1:
            return shape
        return jax.tree.map(lambda each: _shape(each, by_row), shape)

    return jax.tree.map(divided, shapes, is_leaf=lambda each: isinstance(each, Slots | sampling.Sampled))


def _shape(shape: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _specs(argument: Any, share: Share, model: Model | None) -> Any:
    """How an argument of a program is divided."""
    if isinstance(argument, FlatParams):
        assert model is not None
        of_weights = shards.weight_specs(model, argument.nested())
        return dataclasses.replace(argument, leaves=tuple(jax.tree.leaves(of_weights)))
    specs = jax.tree.map(lambda _: share.by_row, argument)
    return dataclasses.replace(specs, cache=share.cache_specs(argument.cache)) if isinstance(argument, Slots) else specs


@partial(_jit, static_argnames=("model", "size", "ends"), donate_argnames=("slots",))
@_by_all_devices(_ROWS, _SLOTS)
def prefill(
    model: Model, params: FlatParams, slots: Slots, call: jax.Array, size: int, ends: int
) -> tuple[jax.Array, Slots]:
    """Adds pieces of prompts to their slots.

    Args:
      slots: donated.
      call: int32: `size` tokens, the indices of the tokens that end prompts, of which there are at most `ends`, then
        the four fields of the call's `Tiles`, whose rows are slots.

    Returns:
      The hidden states [`ends`, D] of the tokens that end prompts, and the slots.
    """
    tokens_T, end_M, tiles = call[:size], call[size : size + ends], Tiles(*call[size + ends :].reshape(4, -1))
    _, positions_T = tiles.tokens(size)
    cache = slots.cache.packed(tiles)
    hidden_1TD, cache = _apply(model, params, tokens_T[None], positions_T[None], cache)
    return hidden_1TD[0, end_M], dataclasses.replace(slots, cache=cache.unpacked())


@partial(_jit, static_argnames=("model",), donate_argnames=("slots",))
@_by_all_devices(_SLOTS)
def keep_logits(model: Model, params: FlatParams, slots: Slots, hidden_MD: jax.Array, slot_M: jax.Array) -> Slots:
    """Gives slots the logits after the last tokens of their prompts.

    Args:
      slots: donated.
      hidden_MD: what `prefill` returned: of at least as many tokens as there are slots.
      slot_M: int32: the slots; B is padding.
    """
    logits_MV = _apply(model, params, hidden_MD[: len(slot_M)], method="head")
    return dataclasses.replace(slots, logits_BV=slots.logits_BV.at[slot_M].set(logits_MV, mode="drop"))


@partial(_jit, donate_argnames=("slots",))
@_by_all_devices(_SLOTS, alike=2)
def set_counts(slots: Slots, slot_1: jax.Array, counts_V: jax.Array) -> Slots:
    """Sets what is counted of a slot's tokens, unless it is B. `slots` is donated."""
    return dataclasses.replace(slots, counts_BV=slots.counts_BV.at[slot_1].set(counts_V, mode="drop"))


@partial(_jit, static_argnames=("kind",), donate_argnames=("slots",))
@_by_all_devices(_SLOTS)
def copy_pages(slots: Slots, copies: jax.Array, kind: int) -> Slots:
    """Copies pages to others, in the layers of one kind.

    Args:
      slots: donated.
      copies: int32: how many, then their sources, then their targets.
    """
    source_Z, target_Z = copies[1:].reshape(2, -1)
    return dataclasses.replace(slots, cache=slots.cache.copied(kind, source_Z, target_Z, copies[0]))


@_jit
@_by_all_devices(_ROWS)
def marker(slots: Slots) -> jax.Array:
    """A number that is there when all programs dispatched so far have run."""
    return slots.logits_BV[:1, 0]


@_jit
@_by_all_devices(_ROWS)
def sample(slots: Slots, rows: jax.Array, settings: sampling.Sampling) -> sampling.Sampled:
    """Draws the next token of some slots.

    Args:
      rows: int32 [B, ROW_FIELDS + steps], of each row: its slot (-1 for none), the position of its first token, how
        many tokens are given, in how many steps it takes part and in how many it is fed, and the tokens given. If there
        are as many rows as slots, row i is slot i or none: then nothing is gathered or scattered.
      settings: of the rows.
    """
    return _sampled(_of_rows(slots, rows), rows, jnp.int32(0), settings)


@partial(_jit, static_argnames=("share",))
def gathered(share: Share, sampled: sampling.Sampled) -> sampling.Sampled:
    """What all rows drew, on each device: a process can read only what its own devices have."""
    whole: sampling.Sampled = jax.lax.with_sharding_constraint(sampled, share.sharding())
    return whole


@partial(_jit, static_argnames=("model",), donate_argnames=("slots",))
@_by_all_devices(_SLOTS)
def advance(model: Model, params: FlatParams, slots: Slots, token_B: jax.Array, rows: jax.Array) -> Slots:
    """Feeds the given or drawn token of each row to its slot, and counts those drawn. -1 makes a slot's logits NaN.

    Args:
      slots: donated. Other slots are unchanged.
      token_B: int32, what `sample` drew.
      rows: as for `sample`.
    """
    step = jnp.int32(0)
    of_rows = _counted(_of_rows(slots, rows), token_B, rows, step)
    return _with_rows(slots, rows, _advanced(model, params, of_rows, token_B, rows, step))


@partial(_jit, static_argnames=("model", "num_steps"), donate_argnames=("slots",))
@_by_all_devices(_SLOTS, _STEPS)
def decode(
    model: Model, params: FlatParams, slots: Slots, rows: jax.Array, settings: sampling.Sampling, num_steps: int
) -> tuple[Slots, sampling.Sampled]:
    """`sample` then `advance`, `num_steps` times in one call; bit-identical to calling them one by one.

    The number of steps is static: the host would wait at each turn of a loop whose end only the device knows.

    Returns:
      The slots, and the tokens of all steps: a `Sampled` whose arrays have the steps as an additional first axis.
    """

    def step(of_rows: Slots, number: jax.Array) -> tuple[Slots, sampling.Sampled]:
        sampled = _sampled(of_rows, rows, number, settings)
        if settings.penalties is not None:  # or nobody reads what is counted of these rows
            of_rows = _counted(of_rows, sampled.token_B, rows, number)
        return _advanced(model, params, of_rows, sampled.token_B, rows, number), sampled

    of_rows, sampled = jax.lax.scan(step, _of_rows(slots, rows), jnp.arange(num_steps, dtype=jnp.int32))
    return _with_rows(slots, rows, of_rows), sampled


def _of_rows(slots: Slots, rows: jax.Array) -> Slots:
    """The tables, lengths and logits of some rows, by row; pools and counts are those of all slots."""
    if len(rows) == len(slots.logits_BV):
        return slots
    slot_B = rows[:, 0]
    return dataclasses.replace(slots, cache=slots.cache.rows(slot_B), logits_BV=slots.logits_BV[slot_B])


def _with_rows(slots: Slots, rows: jax.Array, of_rows: Slots) -> Slots:
    """The slots after what was done to `_of_rows`."""
    if len(rows) == len(slots.logits_BV):
        return of_rows
    target_B = jnp.where(rows[:, 0] < 0, len(slots.logits_BV), rows[:, 0])  # updates out of bounds are dropped
    return dataclasses.replace(
        of_rows,
        cache=slots.cache.joined(rows[:, 0], of_rows.cache),
        logits_BV=slots.logits_BV.at[target_B].set(of_rows.logits_BV, mode="drop"),
    )


def _sampled(of_rows: Slots, rows: jax.Array, step: jax.Array, settings: sampling.Sampling) -> sampling.Sampled:
    slot_B, position_B = rows[:, 0], rows[:, 1]

    def counts() -> jax.Array:
        return of_rows.counts_BV if len(rows) == len(of_rows.counts_BV) else of_rows.counts_BV[slot_B]

    return sampling.sample(of_rows.logits_BV, position_B + step, settings, counts)


def _counted(of_rows: Slots, token_B: jax.Array, rows: jax.Array, step: jax.Array) -> Slots:
    """The slots with drawn tokens counted. Those given were counted when the request joined."""
    slot_B, _, given_B, steps_B, _ = rows[:, :ROW_FIELDS].T
    drawn_B = (slot_B >= 0) & (step >= given_B) & (step < steps_B) & (token_B >= 0)
    target_B = jnp.where(drawn_B, slot_B, of_rows.counts_BV.shape[0])  # updates out of bounds are dropped
    return dataclasses.replace(of_rows, counts_BV=of_rows.counts_BV.at[target_B, token_B].add(2, mode="drop"))


def _advanced(
    model: Model, params: FlatParams, of_rows: Slots, token_B: jax.Array, rows: jax.Array, step: jax.Array
) -> Slots:
    slot_B, position_B, given_B, _, feeds_B = rows[:, :ROW_FIELDS].T
    given = rows[:, ROW_FIELDS:]
    token_B = jnp.where(step < given_B, given[:, jnp.minimum(step, given.shape[1] - 1)], token_B)
    fed_B = (slot_B >= 0) & (step < feeds_B)
    sound_B = token_B >= 0
    positions_B = jnp.where(fed_B & sound_B, position_B + step, -1)
    hidden_B1D, cache = _apply(model, params, token_B[:, None], positions_B[:, None], of_rows.cache)
    logits_BV = jnp.where(sound_B[:, None], _apply(model, params, hidden_B1D[:, 0], method="head"), jnp.nan)
    return dataclasses.replace(of_rows, cache=cache, logits_BV=jnp.where(fed_B[:, None], logits_BV, of_rows.logits_BV))


def _apply(model: Model, params: FlatParams, *arguments: Any, method: str | None = None) -> Any:
    return model.apply({"params": params.nested()}, *arguments, method=method)
