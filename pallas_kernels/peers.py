"""Devices of one process that add up rows among themselves, through mailboxes in each other's memory.

A device writes its numbers into every other one's mailbox, over NVLink, and waits until theirs are in its own. An empty
place in a mailbox has all bits set, which no result of arithmetic has, so a number tells by itself that it has arrived.
Whoever takes it empties the place again.

There are two boxes, of which exchanges one after the other must take turns. Then no number can arrive before the one
before it was taken: whoever writes into a box again has had an answer, in the other box, of each device that had taken
what was there.

XLA's own all-gather of such small sums takes 12 to 25 us a call on two H200s, and is no part of a CUDA graph.
"""

import ctypes
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Final

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import dispatch
from pallas_kernels.partial_sum import PartialSum

BOXES: Final = 2
EMPTY: Final = -1  # as int32
MOST_ROWS: Final = 128  # of an exchange: beyond, more bytes cost more than XLA's latency
_MOST_DEVICES: Final = 8  # that reach each other directly
_HEAD: Final = 4  # numbers of a table before the addresses of all


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Peers:
    """How a device's kernels reach the mailboxes of the devices along some axes of the mesh, its own among them."""

    # int32, of each device: the address of its own mailboxes, low word first, its rank, a 0, and the addresses of all
    # mailboxes by rank. As an argument of a program, [devices, size]; to each device, [1, size].
    table: jax.Array
    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    width: int = dataclasses.field(metadata={"static": True})  # D, of a row

    @property
    def count(self) -> int:
        """Devices that exchange."""
        return (self.table.shape[-1] - _HEAD) // 2

    def own_table(self) -> jax.Array:
        """The table of this device, under `shard_map`: int32 [size]."""
        return self.table.reshape(-1)


class Mailboxes:
    """The memory that `peers` leads to, for as long as this object lives: no program may outlive it."""

    def __init__(self, mesh: Mesh, axes: tuple[str, ...], width: int):
        """Allocates empty mailboxes on all devices of the mesh. `can_exchange` must hold."""
        ranks = _ranks(mesh, axes)
        shape = BOXES, ranks.shape[1], MOST_ROWS, width
        empty = np.full(shape, EMPTY, np.int32)
        devices = mesh.devices.reshape(-1)
        self._boxes = jax.block_until_ready([jax.device_put(empty, device) for device in devices])
        addresses = np.array([box.unsafe_buffer_pointer() for box in self._boxes], np.uint64)
        table = table_of(addresses, ranks)
        sharding = NamedSharding(mesh, P(mesh.axis_names))
        self.peers = Peers(jax.device_put(table, sharding), axes, width)


def can_exchange(mesh: Mesh, axes: Sequence[str], width: int) -> bool:
    """Whether devices along these axes have kernels for rows of this width.

    That is Hopper GPUs of one process that reach each other's memory, over NVLink or PCIe.
    """
    if dispatch.preferred() != dispatch.MOSAIC or width % 4:
        return False
    count = int(np.prod([mesh.shape[axis] for axis in axes]))
    processes = {device.process_index for device in mesh.devices.flat}
    if not 2 <= count <= _MOST_DEVICES or processes != {jax.process_index()}:
        return False
    return _reach_each_other([device.local_hardware_id for device in mesh.devices.flat])


def _reach_each_other(ordinals: Sequence[int]) -> bool:
    """Whether GPUs can access each other's memory, as the driver says; without a driver, they cannot."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False

    def accesses(ordinal: int, other: int) -> bool:
        device, peer, can = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        failed = [cuda.cuDeviceGet(ctypes.byref(each), number) for each, number in ((device, ordinal), (peer, other))]
        failed.append(cuda.cuDeviceCanAccessPeer(ctypes.byref(can), device, peer))
        return not any(failed) and bool(can.value)

    return not cuda.cuInit(0) and all(accesses(*pair) for pair in itertools.permutations(ordinals, 2))


def table_of(addresses: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """`Peers.table` of all devices.

    Args:
      addresses: uint64, of each device's mailboxes.
      ranks: [devices, count]: the devices that each exchanges with, itself included, by rank.
    """
    own = np.arange(len(addresses))
    rank = (ranks == own[:, None]).argmax(axis=1).astype(np.int32)
    words = [addresses[:, None].view(np.int32), rank[:, None], np.zeros_like(rank)[:, None]]
    return np.concatenate([*words, addresses[ranks].view(np.int32)], axis=1)


def _ranks(mesh: Mesh, axes: tuple[str, ...]) -> np.ndarray:
    """Of each device, the numbers in the mesh of those that differ from it along the axes alone, in their order."""
    numbers = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
    along = [mesh.axis_names.index(axis) for axis in axes]
    last = np.moveaxis(numbers, along, range(numbers.ndim - len(along), numbers.ndim))
    groups = last.reshape(-1, int(np.prod([numbers.shape[each] for each in along])))
    found = np.empty((numbers.size, groups.shape[1]), np.int64)
    for group in groups:
        found[group] = group
    return found


def exchanged_or_gathered(terms: PartialSum | None, peers: Peers | None) -> PartialSum | None:
    """The terms as a kernel can take them: if it cannot exchange what other devices have, XLA gathers that first."""
    if terms is None or not terms.over or _exchange(terms, peers):
        return terms
    return terms.gathered()


def _exchange(terms: PartialSum, peers: Peers | None) -> bool:
    rows = terms.parts_JAO.shape[1] if terms.rows_TX is None else terms.rows_TX.shape[0]
    if peers is None or terms.over != peers.axes:
        return False
    return rows <= MOST_ROWS and terms.parts_JAO.shape[2] == peers.width
