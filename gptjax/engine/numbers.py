"""A plan's calls as the int32 arrays that programs take.

Each has its shards' parts one after another, in which slots are numbered from 0. No part depends on the others.
"""

import itertools
from collections.abc import Sequence
from typing import Final

import numpy as np

from gptjax.engine.programs import ROW_FIELDS
from gptjax.scheduling.plan import Copy, DecodeCall, Piece, PrefillCall
from gptjax.scheduling.policy import Policy
from pallas_kernels.pages import TILE

COPIES: Final = 8  # pages of one call for each shard


def of_copies(copies: Sequence[Sequence[Copy]]) -> np.ndarray:
    """At most `COPIES` copies of each shard."""
    numbers = np.zeros((len(copies), 1 + 2 * COPIES), np.int32)
    for part, some in zip(numbers, copies, strict=True):
        part[0] = len(some)
        part[1 : 1 + len(some)] = [copy.source for copy in some]
        part[1 + COPIES : 1 + COPIES + len(some)] = [copy.target for copy in some]
    return numbers.reshape(-1)


def of_slot(policy: Policy, slot: int) -> np.ndarray:
    """One slot; all other shards, or all if it is the one after the last, have the one after their last."""
    shard, own = divmod(slot, policy.slots)
    return np.asarray([own if each == shard else policy.slots for each in range(policy.shards)], np.int32)


def of_prefill(policy: Policy, call: PrefillCall, *, ends: int, tiles: int) -> np.ndarray:
    """The numbers of `programs.prefill`, for at most `ends` prompts that end and `tiles` tiles in each shard."""
    return np.concatenate([_part(policy, call, pieces, ends, tiles) for pieces in _by_shard(policy, call)])


def _part(policy: Policy, call: PrefillCall, pieces: Sequence[Piece], ends: int, tiles: int) -> np.ndarray:
    tokens_T, end_M, tiles_4Q = (np.zeros(shape, np.int32) for shape in (call.size, ends, (4, tiles)))
    of_tiles, last, at = [], [], 0
    for piece in pieces:
        tokens_T[at : at + piece.count] = call.tokens[piece.start : piece.start + piece.count]
        for ahead in range(0, piece.count, TILE):
            where = at + ahead, min(TILE, piece.count - ahead), piece.position + ahead
            of_tiles.append((piece.slot % policy.slots, *where))
        at += piece.count
        last += [at - 1] if piece.ends else []
    end_M[: len(last)] = last
    tiles_4Q[:, : len(of_tiles)] = np.asarray(of_tiles, np.int32).reshape(-1, 4).T
    return np.concatenate((tokens_T, end_M, tiles_4Q.reshape(-1)))


def ending(policy: Policy, call: PrefillCall) -> list[list[int]]:
    """The slots whose prompts end in a call, of each shard."""
    return [[piece.slot % policy.slots for piece in pieces if piece.ends] for pieces in _by_shard(policy, call)]


def of_ends(policy: Policy, slots: Sequence[Sequence[int]], size: int) -> np.ndarray:
    """Slots of each shard, up to `size`, for `programs.keep_logits`."""
    numbers = np.full((policy.shards, size), policy.slots, np.int32)
    for part, some in zip(numbers, slots, strict=True):
        part[: len(some)] = some
    return numbers.reshape(-1)


def of_rows(policy: Policy, call: DecodeCall) -> np.ndarray:
    """The rows of a decode call, as `programs.sample` takes them."""
    numbers = np.zeros((policy.shards * call.size, ROW_FIELDS + call.steps), np.int32)
    numbers[:, 0] = -1
    for place, row in zip(places(policy, call), call.rows, strict=True):
        slot, given = row.slot % policy.slots, len(row.given)
        numbers[place, :ROW_FIELDS] = slot, row.position, given, given + row.draws, row.feeds
        numbers[place, ROW_FIELDS : ROW_FIELDS + given] = row.given
    return numbers


def places(policy: Policy, call: DecodeCall) -> list[int]:
    """Where the programs compute each row of a call: if they compute all slots, where its slot is."""
    if call.size == policy.slots:
        return [row.slot for row in call.rows]
    free = [itertools.count(shard * call.size) for shard in range(policy.shards)]
    return [next(free[policy.shard(row.slot)]) for row in call.rows]


def _by_shard(policy: Policy, call: PrefillCall) -> list[list[Piece]]:
    if policy.shards == 1:
        return [list(call.pieces)]
    return [[each for each in call.pieces if policy.shard(each.slot) == shard] for shard in range(policy.shards)]
