"""Weights in and out of Orbax, and onto devices: bit for bit, of their own memory, or an error that says what to do."""

import logging
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gptjax.checkpoints import saving, weights
from gptjax.checkpoints.manifest import is_converted
from gptjax.checkpoints.safetensors import open_directory
from gptjax.errors import CheckpointError
from tests.checkpoints.weights_material import LEAVES, ROOT, assert_equal, save, targets_of
from tests.convert import made


def test_flatten_and_nest_are_inverse():
    assert weights.flatten(weights.nest(LEAVES)) == LEAVES
    assert weights.nest({("a", "b"): 1, ("a", "c"): 2, ("d",): 3}) == {"a": {"b": 1, "c": 2}, "d": 3}


def test_restores_bit_for_bit(saved):
    assert_equal(weights.restore(saved, targets_of()))
    assert len(os.listdir(saved / "params")) == 4


def test_each_piece_can_be_read_with_orbax_alone(saved):
    found = {}
    for piece in (saved / "params").iterdir():
        found |= weights.flatten(ocp.PyTreeCheckpointer().restore(piece))
    assert all(made.same_bits(found[path], array) for path, array in LEAVES.items())


def test_params_keep_the_order_of_the_targets(saved):
    params = weights.place(reversed(LEAVES.items()), targets_of())
    assert list(params) == ["block_0", "block_1", "embedding", "zeros"]


def test_is_converted(tmp_path, saved):
    assert is_converted(saved)
    assert not is_converted(tmp_path)
    assert not is_converted(tmp_path / "nowhere")


# Casts: halves between neighbours go to the even one, what lies a bit beyond goes up.
BITS = np.array([0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF, 0x00000001, 0x80000000], np.uint32)
TO_BF16 = np.array([0x3F80, 0x3F80, 0x3F82, 0x3F81, 0x3F81, 0x0000, 0x8000], np.uint16)


def test_float32_to_bfloat16_rounds_to_nearest_even():
    cast = weights.cast(BITS.view(np.float32), jnp.bfloat16, "x")
    assert cast.view(np.uint16).tolist() == TO_BF16.tolist()


def test_float32_to_float16_rounds_to_nearest_even():
    values = np.array([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 + 2**-20, 65504, 2**-24, 2**-25, 65519], np.float32)
    cast = weights.cast(values, np.float16, "x")
    assert cast.view(np.uint16).tolist() == [0x3C00, 0x3C02, 0x3C01, 0x7BFF, 0x0001, 0x0000, 0x7BFF]


def test_bfloat16_to_float32_is_exact():
    bits = np.arange(1 << 16, dtype=np.uint16)
    bits = bits[(bits & 0x7F80) != 0x7F80]
    cast = weights.cast(bits.view(ml_dtypes.bfloat16), np.float32, "x")
    assert (cast.view(np.uint32) == bits.astype(np.uint32) << 16).all()


@pytest.mark.parametrize("kind", ["place", "restore"])
def test_casts_to_the_wanted_dtype(saved, kind):
    targets = targets_of(kernel=jnp.bfloat16, bias=jnp.float32, embedding=jnp.float16)
    params = weights.restore(saved, targets) if kind == "restore" else weights.place(LEAVES.items(), targets)
    wanted = weights.flatten(targets)
    assert_equal(params, {path: array.astype(wanted[path].dtype) for path, array in LEAVES.items()})


@pytest.mark.parametrize("source", [np.float32, ml_dtypes.bfloat16])
def test_values_beyond_float16_are_refused(source):
    with pytest.raises(CheckpointError, match="a/b has values beyond float16's 65504; use bfloat16 or float32"):
        weights.place([(("a", "b"), np.full(3, 1e5, source))], {"a": {"b": jax.ShapeDtypeStruct((3,), np.float16)}})


@pytest.mark.parametrize(("found", "wanted"), [(np.uint8, np.float32), (np.float32, np.uint8), (np.float32, np.int32)])
def test_only_floats_are_cast(found, wanted):
    with pytest.raises(CheckpointError, match="only floating-point weights can"):
        weights.place([(("a",), np.zeros(3, found))], {"a": jax.ShapeDtypeStruct((3,), wanted)})


@pytest.mark.parametrize(
    ("leaves", "said"),
    [
        ([("kernel", (2, 3))], "weights are missing: bias"),
        ([("kernel", (2, 3)), ("bias", (3,)), ("bias", (3,))], "bias is duplicated"),
        ([("kernel", (2, 3)), ("scale", (3,))], "scale is not in the model"),
        ([("kernel", (3, 2)), ("bias", (3,))], r"kernel is \[3, 2\], expected \[2, 3\]"),
    ],
)
def test_place_checks_what_it_is_given(leaves, said):
    targets = {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32), "bias": jax.ShapeDtypeStruct((3,), jnp.float32)}
    with pytest.raises(CheckpointError, match=said):
        weights.place([((name,), np.zeros(shape, np.float32)) for name, shape in leaves], targets)


def test_place_takes_one_weight_at_a_time():
    """The one before is on the device, and gone from the host, when the next one is asked for."""
    import weakref

    alive = []

    def leaves():
        for name in "abc":
            assert not any(reference() is not None for reference in alive)
            array = np.ones(1000, np.float32)
            alive.append(weakref.ref(array))
            yield (name,), array
            del array

    weights.place(leaves(), {name: jax.ShapeDtypeStruct((1000,), jnp.bfloat16) for name in "abc"})
    assert len(alive) == 3


def _read(tmp_path):
    """A weight as it is read from a file, aligned such that the CPU backend takes it without copying."""
    array = np.arange(1 << 16, dtype=np.float32)
    made.write(tmp_path / "model.safetensors", {"x": array})
    return array, open_directory(tmp_path).read("x")


def test_params_do_not_change_with_the_array_that_they_were_made_of():
    array = np.arange((1 << 16) + 16, dtype=np.float32)
    array = array[-array.ctypes.data % 64 // 4 :][: 1 << 16]
    assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data  # the danger is real
    before = array.copy()
    params = weights.place([(("x",), array)], {"x": jax.ShapeDtypeStruct(array.shape, array.dtype)})
    array[:] = 7
    assert np.array_equal(params["x"], before)


@pytest.mark.parametrize("kind", ["place", "restore"])
def test_params_can_be_donated(tmp_path, kind):
    array, view = _read(tmp_path)
    targets = {"x": jax.ShapeDtypeStruct(array.shape, array.dtype)}
    save(tmp_path / "dst", {("x",): array})
    params = (
        weights.restore(tmp_path / "dst", targets) if kind == "restore" else weights.place([(("x",), view)], targets)
    )
    before = params["x"].unsafe_buffer_pointer()
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(params["x"])
    assert params["x"].is_deleted()
    assert after.unsafe_buffer_pointer() == before  # used in place
    assert np.array_equal(view, array)


SHARDED = """
import sys, jax, numpy as np
from pathlib import Path
from gptjax.checkpoints import weights
from tests.checkpoints.weights_material import save
mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
array = np.arange(8 * 64, dtype=np.float32).reshape(8, 64)
def target(*spec):
    return jax.ShapeDtypeStruct((8, 64), jax.numpy.bfloat16, sharding=jax.NamedSharding(mesh, jax.P(*spec)))
targets = {"rows": target("tensor"), "columns": target(None, "tensor"), "all": target()}
targets["both"] = target("data", "tensor")
leaves = [((name,), array) for name in targets]
save(Path(sys.argv[1]), dict(leaves))
for params in (weights.place(leaves, targets), weights.restore(Path(sys.argv[1]), targets)):
    for name, target in targets.items():
        x = params[name]
        assert x.sharding == target.sharding and x.dtype == target.dtype, (x.sharding, x.dtype)
        assert np.array_equal(np.asarray(x).astype(np.float32), array.astype(x.dtype).astype(np.float32))
        places = {shard.data.unsafe_buffer_pointer() for shard in x.addressable_shards}
        assert len(places) == 8, name  # no two devices share memory
print("done")
"""


def test_shardings_of_the_targets(tmp_path):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "dst")]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert (result.stdout, result.stderr) == ("done\n", "")


def test_orbax_is_silent_and_the_logging_of_others_is_as_it_was(tmp_path, capfd):
    logger = logging.getLogger("absl")
    before = (logger.level, list(logger.filters), list(logger.handlers))
    save(tmp_path / "dst")
    weights.restore(tmp_path / "dst", targets_of())
    assert capfd.readouterr() == ("", "")
    assert (logger.level, list(logger.filters), list(logger.handlers)) == before


def test_a_piece_is_of_bounded_size_or_a_single_weight(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "PIECE_BYTES", 100)
    leaves = {(str(i),): np.zeros(size, np.uint8) for i, size in enumerate([40, 60, 1, 500, 99, 2, 98])}
    manifest = save(tmp_path / "dst", leaves)
    assert [leaf.piece for leaf in manifest.leaves] == ["0000", "0000", "0001", "0002", "0003", "0004", "0004"]


def test_a_slow_weight_holds_up_none_of_the_others():
    others, taken = threading.Semaphore(0), []

    def slow():
        assert all(others.acquire(timeout=60) for _ in range(5))
        return "slow"

    def quick():
        others.release()
        return "quick"

    def jobs():
        for job in (slow, *[quick] * 5):
            taken.append(job)
            yield job

    results = weights._in_threads(jobs(), workers=2)
    assert next(results) == "quick"
    assert len(taken) == 2  # one for each worker
    rest = [*results]
    assert rest[:3] == ["quick"] * 3
    assert sorted(rest[3:]) == ["quick", "slow"]  # may be ready at the same time


def test_a_weight_that_cannot_be_read_is_an_error_in_threads_too():
    def broken():
        raise CheckpointError("broken")

    with pytest.raises(CheckpointError, match="broken"):
        list(weights._in_threads(iter([lambda: 1, broken, lambda: 2]), workers=2))
