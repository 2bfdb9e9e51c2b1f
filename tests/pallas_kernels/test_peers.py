"""Sums over devices through mailboxes: kernels emulated on a CPU, one device after the other; lowered; on two GPUs."""

import ctypes
import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch, peers, ptx
from pallas_kernels.add_norm import exchange_sm90
from pallas_kernels.add_norm import mosaic_sm90 as add_norm
from pallas_kernels.partial_sum import PartialSum
from pallas_kernels.peers import BOXES, EMPTY, MOST_ROWS, Mailboxes, Peers, table_of
from pallas_kernels.route import mosaic_sm90 as route
from tests.oracles import add_norm_numpy
from tests.oracles.add_norm_numpy import Case
from tests.pallas_kernels.emulated_ptx import ALREADY_THERE, launched
from tests.pallas_kernels.marks import lowered, needs_mosaic

EPSILON = 1e-5
AXES = ("tensor",)


def _peers(count: int, width: int, rank: int, addresses: list[int] | None = None) -> Peers:
    """A device's table. By default, all mailboxes are at one place, so it does not matter whose is written to."""
    places = np.array(addresses or [ALREADY_THERE] * count, np.uint64)
    table = table_of(places, np.tile(np.arange(count), (count, 1)))
    return Peers(jnp.asarray(table[rank]), AXES, width)


def _split(terms: PartialSum, count: int, seed: int, sharers: int = 1) -> list[PartialSum]:
    """Terms of as many devices: other numbers, and the same biases."""
    rng = np.random.default_rng(seed)
    shape = terms.parts_JAO.shape
    parts = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(count)]
    own = [PartialSum(each, terms.rows_TX, terms.weights_TX, terms.bias_EO, terms.bias_rows_TX) for each in parts]
    return [dataclasses.replace(each.across(AXES, box=1), sharers=sharers) for each in own]


def _own_sum(terms: PartialSum, rank: int) -> np.ndarray:
    """What a device sends of it, in the kernels' order: without a bias that another device adds."""
    if not terms.is_plain:
        bias_EO = terms.bias_EO
        if bias_EO is not None and rank % terms.sharers:
            bias_EO = jnp.zeros_like(bias_EO)
        own = PartialSum(terms.parts_JAO, terms.rows_TX, terms.weights_TX, bias_EO, terms.bias_rows_TX)
        return np.asarray(own.total())
    total = np.asarray(terms.parts_JAO[0])
    for part in terms.parts_JAO[1:]:
        total = total + np.asarray(part)
    return total


@needs_mosaic
@pytest.mark.parametrize(
    ("case", "count", "sharers"),
    [
        (Case(T=2, D=768, S=2, E=1), 2, 1),
        (Case(T=2, D=768, S=2, E=1), 3, 1),
        (Case(T=3, D=2880, S=4), 2, 1),
        (Case(T=2, D=96, S=1, X=3, E=3, weighted=True), 3, 1),
        (Case(T=2, D=96, S=1, X=3, E=3, weighted=True), 2, 2),
        (Case(T=2, D=96, S=1, X=3, E=3, weighted=True), 4, 2),
    ],
    ids=str,
)
def test_a_norm_adds_what_the_others_sent(case, count, sharers, monkeypatch):
    """In the order of ranks, on each device: and it sends its own, and leaves its boxes empty."""
    x, terms, scale, _ = add_norm_numpy.operands(case, jnp.bfloat16)
    devices = _split(terms, count, seed=case.D, sharers=sharers)
    sent = np.stack([_own_sum(each, rank) for rank, each in enumerate(devices)])
    bias = np.asarray(terms.bias_EO, np.float64)[0] if devices[0].is_plain and terms.bias_EO is not None else 0.0
    expected = np.asarray(x, np.float64) + sent.astype(np.float64).sum(axis=0) + bias
    sums = []
    for rank, own in enumerate(devices):
        # This device's mailboxes, then one of each of the others.
        boxes = np.full((count, BOXES, count, MOST_ROWS, case.D), EMPTY, np.int32)
        arrived = boxes[rank, 1, :, : case.T]
        others = np.arange(count) != rank
        arrived[others] = sent[others].view(np.int32)
        addresses = [ALREADY_THERE + number * boxes[0].nbytes for number in range(count)]
        monkeypatch.setattr(ptx, "launch", launched(add_norm, exchange_sm90, before=boxes))
        given = _peers(count, case.D, rank, addresses)
        found = add_norm.add_norm.__wrapped__(x, own, scale, peers=given, epsilon=EPSILON, center=False)
        sums.append(np.asarray(found[0], np.float64))
        np.testing.assert_allclose(sums[-1], expected, rtol=2**-8, atol=1e-4)
        np.testing.assert_array_equal(sums[-1], sums[0])
        assert (boxes[rank] == EMPTY).all()
        for other in np.flatnonzero(others):
            np.testing.assert_allclose(boxes[other, 1, rank, : case.T].view(np.float32), sent[rank], rtol=0, atol=1e-5)
            boxes[other, 1, rank, : case.T] = EMPTY
        assert (boxes == EMPTY).all()


@needs_mosaic
def test_what_a_device_sends_is_never_empty(monkeypatch):
    """Not even if a broken kernel left all bits set, which is NaN: then it sends another NaN."""
    D = 64
    parts = np.full((1, 1, D), EMPTY, np.int32).view(np.float32)
    boxes = np.full((2, BOXES, 2, MOST_ROWS, D), EMPTY, np.int32)
    boxes[0, 0, 1, 0] = np.zeros(D, np.float32).view(np.int32)
    monkeypatch.setattr(ptx, "launch", launched(add_norm, exchange_sm90, before=boxes))
    given = _peers(2, D, 0, [ALREADY_THERE, ALREADY_THERE + boxes[0].nbytes])
    own = PartialSum(jnp.asarray(parts)).across(AXES, box=0)
    x, scale = jnp.ones((1, D), jnp.bfloat16), jnp.ones(D, jnp.bfloat16)
    summed, _ = add_norm.add_norm.__wrapped__(x, own, scale, peers=given, epsilon=EPSILON, center=False)
    assert np.isnan(np.asarray(summed, np.float32)).all()
    sent = boxes[1, 0, 0, 0]
    assert (sent != EMPTY).all() and np.isnan(sent.view(np.float32)).all()


@needs_mosaic
@pytest.mark.parametrize("T", [1, 8, 128])
@pytest.mark.parametrize("count", [2, 8])
def test_norms_that_exchange_lower_for_cuda(T, count):
    case = Case(T=T, D=2880, S=3, X=4, E=16, weighted=True)
    x, terms, scale, _ = add_norm_numpy.operands(case, jnp.bfloat16)
    own, given = terms.across(AXES, box=1), _peers(count, 2880, 1)
    plain = PartialSum(jnp.zeros((4, T, 2880)), bias_EO=jnp.zeros((1, 2880))).across(AXES, box=0)
    router, positions = jnp.zeros((2880, 32), jnp.bfloat16), jnp.zeros((T,), jnp.int32)
    norm = partial(add_norm.add_norm, epsilon=EPSILON, center=False)
    chosen = partial(route.norm_route, epsilon=EPSILON, top=4)
    for text in (
        lowered(lambda x, terms, peers: norm(x, terms, scale, peers=peers), x, own, given),
        lowered(
            lambda x, terms, peers: chosen(x, terms, scale, router, router[0], positions, peers=peers), x, plain, given
        ),
    ):
        assert text.count("custom_call @mosaic_gpu") == 1


def test_a_table_leads_to_the_devices_along_the_axes():
    mesh = Mesh(np.array(jax.devices() * 8)[:8].reshape(2, 2, 2), ("data", "tensor", "expert"))
    for axes, groups in (
        (("tensor",), [[0, 2], [1, 3], [4, 6], [5, 7]]),
        (("expert", "tensor"), [[0, 2, 1, 3], [4, 6, 5, 7]]),
        (("tensor", "expert"), [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ):
        ranks = peers._ranks(mesh, axes)
        for group in groups:
            for device in group:
                assert ranks[device].tolist() == group
        addresses = np.arange(8, dtype=np.uint64) * 2**33 + 16
        table = table_of(addresses, ranks)
        for device in range(8):
            words = table[device].astype(np.int32).view(np.uint64)
            assert words[0] == addresses[device]
            assert words[1] == ranks[device].tolist().index(device)
            assert words[2:].tolist() == addresses[ranks[device]].tolist()


def test_mailboxes_are_empty_and_where_the_table_says():
    mesh = Mesh(np.array(jax.devices()[:1]), ("tensor",))
    boxes = Mailboxes(mesh, ("tensor",), 64)
    (box,) = boxes._boxes
    assert box.shape == (BOXES, 1, MOST_ROWS, 64) and (np.asarray(box) == EMPTY).all()
    (table,) = np.asarray(boxes.peers.table)
    assert table.view(np.uint64).tolist() == [box.unsafe_buffer_pointer(), 0, box.unsafe_buffer_pointer()]
    assert boxes.peers.count == 1


@pytest.mark.parametrize(
    ("unreachable", "failing", "reach"), [(None, 0, True), ((2, 1), 0, False), (None, 100, False)], ids=str
)
def test_gpus_must_reach_each_other_both_ways(unreachable, failing, reach, monkeypatch):
    """As the driver says: here one that knows devices by their ordinals plus 10."""

    class Driver:
        def cuInit(self, flags):
            return failing

        def cuDeviceGet(self, device, ordinal):
            device._obj.value = 10 + ordinal
            return 0

        def cuDeviceCanAccessPeer(self, can, device, peer):
            can._obj.value = (device.value - 10, peer.value - 10) != unreachable
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert peers._reach_each_other([0, 1, 2]) == reach


needs_two = pytest.mark.skipif(
    dispatch.preferred() != dispatch.MOSAIC or jax.local_device_count() < 2, reason="needs two Hopper GPUs"
)


@needs_two
@pytest.mark.parametrize("T", [1, 2, 8, 32, 128])
def test_devices_exchange(T):
    """Layer after layer, and again and again: as XLA adds up, to the bit."""
    D, layers = 2880, 24
    mesh = Mesh(np.array(jax.devices()[:2]), AXES)
    boxes = Mailboxes(mesh, AXES, D)
    rng = np.random.default_rng(T)
    parts = jnp.asarray(rng.standard_normal((2, layers, 4, T, D)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((T, D)), jnp.bfloat16)
    scale, bias = jnp.ones(D, jnp.bfloat16), jnp.asarray(rng.standard_normal((1, D)), jnp.bfloat16)
    rows = jnp.asarray(rng.integers(0, T, (T, 4)), jnp.int32)
    weights, biases = (
        jnp.asarray(rng.random((T, 4)), jnp.float32),
        jnp.asarray(rng.standard_normal((3, D)), jnp.bfloat16),
    )
    norm = partial(add_norm.add_norm, epsilon=EPSILON, center=False)

    def through(x: jax.Array, parts: jax.Array, peers: Peers | None) -> jax.Array:
        for layer in range(layers):
            if layer % 2:
                terms = PartialSum(parts[0, layer], rows, weights, biases, rows % 3, sharers=2).across(AXES, 1)
            else:
                terms = PartialSum(parts[0, layer], bias_EO=bias).across(AXES, 0)
            x, normed = norm(x, terms if peers is not None else terms.gathered(), scale, peers=peers)
            x = x + normed
        return x[None]

    def run(peers: Peers | None) -> Any:
        specs = (P(), P(*AXES), None if peers is None else Peers(P(*AXES), AXES, D))
        return jax.jit(jax.shard_map(through, mesh=mesh, in_specs=specs, out_specs=P(*AXES), check_vma=False))

    expected = np.asarray(run(None)(x, parts, None))
    np.testing.assert_array_equal(expected[0], expected[1])
    exchanging = run(boxes.peers)
    for _ in range(200):
        found = exchanging(x, parts, boxes.peers)
        np.testing.assert_array_equal(np.asarray(found), expected)
