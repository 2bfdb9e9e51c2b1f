"""Tokens put together by expert."""

from functools import partial

import numpy as np
import pytest

from pallas_kernels.moe.routing import BY_EXPERT, route, sorted_groups
from tests.thinned import thorough

TOKENS = [1, 2, 7, 64, 128, 129, 300]
CASES = [(route, T) for T in TOKENS if T <= BY_EXPERT] + [(partial(sorted_groups, largest=8), T) for T in TOKENS]
SOME = 1, 128, 300


def _check(routing, experts_TX: np.ndarray, num_experts: int) -> None:
    """Every pair whose expert exists is in one slot of a group of that expert, and nothing else is in any."""
    experts_U, rows_UM, places_TX = (np.asarray(x) for x in (*routing.groups, routing.places_TX))
    R = rows_UM.shape[1]
    used = (rows_UM >= 0) & ((experts_U >= 0) & (experts_U < num_experts))[:, None]
    assert (np.diff(used.astype(int), axis=1) <= 0).all(), "used slots come first"
    seen = set()
    for t, chosen in enumerate(experts_TX):
        for x, expert in enumerate(chosen):
            place = places_TX[t, x]
            if not 0 <= expert < num_experts:
                assert place == -1 or not used[place // R].any()
                continue
            assert experts_U[place // R] == expert
            assert rows_UM[place // R, place % R] == t
            seen.add(int(place))
    assert used.sum() == len(seen)


@pytest.mark.parametrize(("make", "T"), [case if case[1] in SOME else thorough(*case) for case in CASES])
@pytest.mark.parametrize("routing", ["random", "same", "some missing", "all missing"])
def test_every_pair_has_its_slot(make, T, routing):
    E, X = 12, 3
    rng = np.random.default_rng(T)
    experts_TX = np.stack([rng.permutation(E)[:X] for _ in range(T)]).astype(np.int32)
    if routing == "same":
        experts_TX = np.broadcast_to(experts_TX[:1], (T, X))
    elif routing == "some missing":
        experts_TX = np.where(rng.random((T, 1)) < 0.3, rng.choice([-1, E, 99], (T, 1)), experts_TX).astype(np.int32)
    elif routing == "all missing":
        experts_TX = np.full((T, X), E, np.int32)
    _check(make(experts_TX, E), experts_TX, E)
