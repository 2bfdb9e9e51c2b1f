"""Arrays out of files, and the memory that they are read into."""

import threading

import jax.numpy as jnp
import numpy as np

from gptjax.support.raw import Buffers, read_array

MEGABYTES = 1 << 21


def _address(array):
    return array.__array_interface__["data"][0]


def test_memory_is_used_again_once_an_array_is_gone():
    buffers = Buffers()
    first = buffers.empty((MEGABYTES,), np.dtype(np.uint8))
    address = _address(first)
    del first
    second = buffers.empty((MEGABYTES // 8, 2), np.dtype(jnp.bfloat16))  # half as large, of another type
    assert _address(second) == address
    assert (second.shape, second.dtype) == ((MEGABYTES // 8, 2), jnp.bfloat16)


def test_memory_is_not_used_again_while_anything_sees_it():
    buffers = Buffers()
    first = buffers.empty((MEGABYTES,), np.dtype(np.uint8))
    first[:] = 7
    view = first.reshape(-1, 2)[100:].view(np.uint16)
    del first
    others = [buffers.empty((MEGABYTES,), np.dtype(np.uint8)) for _ in range(3)]
    for other in others:
        other[:] = 0
    assert (view == 0x0707).all()


def test_only_the_largest_few_are_kept():
    buffers = Buffers()
    arrays = [buffers.empty((MEGABYTES * size,), np.dtype(np.uint8)) for size in (1, 5, 2, 4, 3, 6)]
    arrays.clear()
    assert [free.nbytes // MEGABYTES for free in buffers._free] == [6, 5, 4, 3]


def test_threads_share_buffers_and_never_memory(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 8 * MEGABYTES, np.uint8)
    (tmp_path / "file").write_bytes(data.tobytes())
    buffers, wrong = Buffers(), []

    def read(seed):
        rng = np.random.default_rng(seed)
        for _ in range(30):
            offset = int(rng.integers(0, 4 * MEGABYTES))
            size = int(rng.integers(1, 4 * MEGABYTES))
            array = read_array(tmp_path / "file", np.dtype(np.uint8), (size,), offset=offset, buffers=buffers)
            if not np.array_equal(array, data[offset : offset + size]):
                wrong.append((seed, offset, size))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
