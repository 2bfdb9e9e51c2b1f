"""Tokens put together by expert."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import ptx
from pallas_kernels.moe.routing import BY_EXPERT, route, sorted_groups
from tests.pallas_kernels.emulated_ptx import launched
from tests.pallas_kernels.marks import needs_hopper, needs_mosaic
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


@needs_mosaic
@pytest.mark.parametrize(
    ("T", "X", "E", "slots", "routing"),
    [
        (2048, 4, 32, 128, "random"),  # gpt-oss-20b's
        (1000, 4, 128, 64, "some missing"),  # gpt-oss-120b's experts
        (129, 3, 12, 20, "random"),
        (700, 3, 1, 8, "same"),  # one expert, of a pair each: the others do not exist
        (513, 1, 5, 4, "same"),
        (40, 2, 7, 16, "all missing"),
        (1, 4, 33, 16, "random"),
    ],
)
def test_the_kernel_emulated_has_the_integers_of_xla(T, X, E, slots, routing, monkeypatch):
    mosaic = importlib.import_module("pallas_kernels.moe.groups_sm90")
    monkeypatch.setattr(ptx, "launch", launched(mosaic))
    rng = np.random.default_rng(T)
    experts_TX = np.stack([rng.permutation(max(E, X))[:X] for _ in range(T)]).astype(np.int32)
    if routing == "same":
        experts_TX[:] = np.arange(X)[::-1]
    elif routing == "some missing":
        missing = rng.choice([-1, E, np.iinfo(np.int32).min], (T, X))
        experts_TX = np.where(rng.random((T, X)) < 0.3, missing, experts_TX).astype(np.int32)
    elif routing == "all missing":
        experts_TX[:] = -1
    assert mosaic.supports(experts_TX, E, slots)
    found, used_U = mosaic.sorted_groups.__wrapped__(jnp.asarray(experts_TX), E, slots)
    _check(found, experts_TX, E)
    expected = jax.jit(partial(sorted_groups, num_experts=E, largest=slots))(experts_TX)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other, strict=True)
    np.testing.assert_array_equal(used_U, (found.groups.rows_UM >= 0).sum(axis=1))


@needs_mosaic
@pytest.mark.parametrize("width", [64, 2880])
def test_rows_are_gathered_in_the_order_of_fragments(width, monkeypatch):
    mosaic = importlib.import_module("pallas_kernels.moe.gather_sm90")
    monkeypatch.setattr(ptx, "launch", launched(mosaic))
    rng = np.random.default_rng(width)
    x_TI, rows_UM = (
        rng.permutation(3 * width).reshape(3, width).astype(np.int16),
        np.array([[2, 0, -1], [1, -1, -1]], np.int32),
    )
    found = mosaic.gathered.__wrapped__(jnp.asarray(x_TI.view(jnp.bfloat16)), rows_UM).view(np.int16)
    columns = [16 * q + 4 * p + 2 * c + h for p in range(4) for c in range(2) for q in range(4) for h in range(2)]
    expected = x_TI.reshape(3, -1, 64)[:, :, columns].reshape(3, width)
    for slot, row in ((0, 2), (1, 0), (3, 1)):
        np.testing.assert_array_equal(found[slot], expected[row])
    assert (found[[2, 4, 5]] == -1).all(), "nothing is written to an empty slot"


@needs_hopper
@pytest.mark.parametrize("E", [5, 32, 128])
@pytest.mark.parametrize("T", [1, 128, 333, 2048])
def test_the_kernel_has_the_integers_of_xla_again_and_again(T, E):
    mosaic = importlib.import_module("pallas_kernels.moe.groups_sm90")
    rng = np.random.default_rng(T)
    experts_TX = jnp.asarray(np.stack([rng.permutation(E + 3)[:4] - 1 for _ in range(T)]), jnp.int32)
    expected = jax.jit(partial(sorted_groups, num_experts=E, largest=64))(experts_TX)
    for _ in range(20):
        found, used_U = mosaic.sorted_groups(experts_TX, E, 64)
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(used_U, (found.groups.rows_UM >= 0).sum(axis=1))


@needs_mosaic
def test_what_the_kernel_does_not_take():
    supports = importlib.import_module("pallas_kernels.moe.groups_sm90").supports

    def experts(T: int, dtype: type = np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((T, 4), dtype)

    assert supports(experts(2048), 128, 128)
    assert not supports(experts(2049), 128, 128)
    assert not supports(experts(2048), 129, 16)
    assert not supports(experts(2048), 128, 256), "more slots than shared memory has room for"
    assert not supports(experts(2048), 32, 30)
    assert not supports(experts(0), 32, 16)
    assert not supports(experts(8, np.int16), 32, 16)
