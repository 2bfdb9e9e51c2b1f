"""Programs that one process has compiled are run by others, untraced, if nobody else can have changed them."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable

from gptjax.engine import executables
from gptjax.engine.engine import Engine
from gptjax.engine.executables import Executables
from gptjax.engine.flat_params import FlatParams
from gptjax.scheduling.policy import Policy
from gptjax.support import fingerprint, runtime
from gptjax.support.private_files import PrivateFiles
from tests.engine import executables_process as material
from tests.engine.test_engine import MIXED, MODEL, _run, made_params

ROOT = Path(__file__).parents[2]


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """The directory of this process's executables."""
    monkeypatch.setattr(runtime, "_executables", tmp_path / "executables")
    monkeypatch.setattr(fingerprint, "sources_are_current", lambda: True)  # somebody may be editing
    fingerprint._of_process.cache_clear()
    executables._in_use.clear()
    yield tmp_path / "executables"
    fingerprint._of_process.cache_clear()


def _process(cache: Path | str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.engine.executables_process"],
        cwd=ROOT,
        env=os.environ | {"GPTJAX_CACHE_DIR": str(cache), "JAX_PLATFORMS": "cpu"} | environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def _printed(process: subprocess.Popen) -> dict:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return json.loads(out)


def test_a_second_process_traces_nothing_and_gets_the_same_bits(tmp_path):
    first, at_once = (_printed(each) for each in [_process(tmp_path), _process(tmp_path)])
    assert {*first["traced"], *at_once["traced"]} == {"mixed 1", "counted", "mixed 2"}  # one may be ahead of the other
    assert first["results"] == at_once["results"]
    files = sorted((tmp_path / "executables").iterdir())
    assert [file.name.split("-")[0] for file in files] == ["counted", "mixed", "mixed"]
    before = [(file.stat().st_ino, file.read_bytes()) for file in files]
    second = _printed(_process(tmp_path))
    assert second["traced"] == []
    assert second["results"] == first["results"]
    assert [(file.stat().st_ino, file.read_bytes()) for file in files] == before
    # What XLA reads from JAX's cache would not run again.
    for file in files:
        file.unlink()
    assert _printed(_process(tmp_path))["traced"] == ["mixed 1", "counted", "mixed 2"]
    assert _printed(_process(tmp_path))["results"] == first["results"]


def test_nothing_is_kept_on_a_platform_where_it_was_never_run(kept, monkeypatch):
    monkeypatch.setattr(executables, "_TRIED", ("tpu",))
    params = FlatParams.of({"a": jnp.ones(3)})
    doubled = jax.jit(lambda params: 2 * params.leaves[0])
    np.testing.assert_array_equal(Executables(params)(doubled, params), 2)
    assert not kept.exists()


@pytest.mark.thorough  # three processes that compile; on a platform where it is never kept: the test above
def test_nothing_is_kept_where_programs_are_not(tmp_path):
    """`GPTJAX_CACHE_DIR` is empty, JAX has a cache of its own, or its caching is off."""
    for environment in (
        {"GPTJAX_CACHE_DIR": "", "XDG_CACHE_HOME": str(tmp_path)},
        {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "own")},
        {"JAX_ENABLE_COMPILATION_CACHE": "false"},
    ):
        assert _printed(_process(tmp_path / "ours", **environment))["directory"] == "None"
    assert not (tmp_path / "ours" / "executables").exists()


def _engine() -> Engine:
    """One that has few programs: each is compiled anew, as what JAX's cache holds would not run again."""
    policy = Policy(slots=2, chunk=32, pieces=2, smallest_rows=2)
    return Engine(MODEL, made_params(), batch=2, max_length=300, policy=policy, pages=(9,))


def test_an_engine_runs_the_programs_of_an_earlier_one(kept, monkeypatch):
    monkeypatch.setattr(runtime, "_executables", None)
    expected = _run(_engine(), MIXED)
    monkeypatch.setattr(runtime, "_executables", kept)
    traced = _traced(monkeypatch)
    for number, warm in enumerate((True, True, False)):
        executables._in_use.clear()  # as in another process
        engine = _engine()
        if warm:
            engine.warm_up_largest()
            assert engine.wait_until_compiled()
        assert _run(engine, MIXED) == expected
        assert bool(traced) == (number == 0)
        traced.clear()
    names = [file.name.split("-")[0] for file in kept.iterdir()]
    assert {"prefill", "advance", "sample", "keep_logits", "set_counts"} <= set(names)


@pytest.mark.thorough
def test_programs_that_do_not_run_are_replaced(kept, monkeypatch, caplog):
    """On a CPU, what was read and then serialised again lacks its code, which shows only when it is run."""
    engine, loaded, read = _engine(), {}, executables._Place.read
    engine.warm_up()
    expected = _run(engine, MIXED)

    def spied(place, returned):
        loaded[place.name] = read(place, returned)
        return loaded[place.name]

    with monkeypatch.context() as patch:
        patch.setattr(executables._Place, "read", spied)
        executables._in_use.clear()
        _engine().warm_up()
    files = PrivateFiles(kept, most_bytes=1 << 30)
    for name, program in loaded.items():
        files.write(name, files.head(name), serialize_executable.serialize(program)[0])
    for warnings in (1, 0):
        executables._in_use.clear()
        engine = _engine()
        engine.warm_up()
        assert _run(engine, MIXED) == expected
        assert caplog.text.count("do not run, and are compiled again") == warnings
        caplog.clear()


def test_executors_of_a_process_share_programs_and_leave_none(kept, monkeypatch):
    params, pair = material.made()
    doubled = FlatParams(tuple(2 * leaf for leaf in params.leaves), params.tree)
    first, second = Executables(params), Executables(doubled)

    def total(call, params: FlatParams, power: int) -> float:
        return float(call(material.mixed, params, jax.tree.map(jnp.copy, pair), np.float32(1.5), power)[0])

    def expected(params: FlatParams, power: int) -> float:
        return float(material.mixed(params, jax.tree.map(jnp.copy, pair), np.float32(1.5), power)[0])

    assert total(first, params, 1) == pytest.approx(expected(params, 1))
    with monkeypatch.context() as patch:
        patch.delattr(executables._Place, "read_head")
        assert total(second, doubled, 1) == pytest.approx(expected(doubled, 1))
        first._params = params = None  # the other's weights may go
        assert total(second, doubled, 1) == pytest.approx(expected(doubled, 1))
    assert [*second._ready.values()] == [*first._ready.values()]
    assert total(second, doubled, 2) == pytest.approx(expected(doubled, 2))
    assert len(second._ready) == len(executables._in_use) == 2
    assert second.forget()  # as what was there does not run
    assert total(second, doubled, 1) == pytest.approx(expected(doubled, 1))
    assert [*second._ready.values()] != [*first._ready.values()]
    del first, second
    gc.collect()
    assert not executables._in_use


def _traced(monkeypatch) -> list[str]:
    """The programs that are lowered from now on."""
    traced, lower = [], Executables.lower

    def spied(self, program, *arguments):
        lowered = lower(self, program, *arguments)
        if type(lowered).__name__ == "_Traced":
            traced.append(program.__name__)
        return lowered

    monkeypatch.setattr(Executables, "lower", spied)
    return traced


def _names(kept: Path) -> set[str]:
    return {file.name for file in kept.iterdir()}


def test_what_a_program_takes_is_in_its_name(kept):
    params, _ = material.made()
    call = Executables(params)

    class Model(nn.Module):
        width: int

    def program(*arguments):
        return jax.tree.map(lambda leaf: leaf + 1, [each for each in arguments if not isinstance(each, int | Model)])

    jitted = jax.jit(program, static_argnums=(0, 3))
    pair = dataclasses.replace(material.made()[1], first=jnp.ones((2, 3)))
    ones, rows = np.ones(3, np.float32), np.ones(4, np.float32)
    calls = [
        (Model(3), pair, ones, 1),
        (Model(4), pair, ones, 1),  # the model's configuration
        (Model(3), pair, ones, 2),  # a number of the program
        (Model(3), pair, rows, 1),  # a shape
        (Model(3), pair, ones.astype(np.int32), 1),  # a dtype
        (Model(3), dataclasses.replace(pair, name="b"), ones, 1),  # the tree
        (Model(3), pair, jnp.float32(1) * jnp.ones(3), 1),  # the first one again
        (Model(3), pair, jnp.asarray(1.0) * jnp.ones((), jnp.float32), 1),
    ]
    for number, arguments in enumerate(calls, 1):
        Executables(params)(jitted, *arguments)
        assert len(_names(kept)) == number - (number > 6)
    with jax.default_matmul_precision("highest" if jax.config.jax_default_matmul_precision is None else "default"):
        call(jitted, *calls[0])
    assert len(_names(kept)) == len(calls)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("__version__", "0"),
        ("_sources", lambda: "x"),
        ("_versions", lambda: ["jaxlib==0"]),
        ("_processor", lambda: "another"),
    ],
)
def test_versions_sources_and_the_processor_are_in_a_programs_name(kept, monkeypatch, name, value):
    before = fingerprint.digest("x")
    assert before == fingerprint.digest("x") != fingerprint.digest("y")
    monkeypatch.setattr(fingerprint, name, value)
    fingerprint._of_process.cache_clear()
    assert fingerprint.digest("x") != before


@pytest.mark.parametrize("change", ["platform", "device_kind", "platform_version", "compute_capability", "count"])
def test_the_device_is_in_a_programs_name(kept, monkeypatch, change):
    def named(**changed: str) -> str:
        values = {"platform": "gpu", "device_kind": "H200", "platform_version": "12.9", "compute_capability": "9.0"}
        values |= changed
        device = SimpleNamespace(**values, client=SimpleNamespace(platform_version=values["platform_version"]))
        monkeypatch.setattr(jax, "devices", lambda: [device])
        monkeypatch.setattr(jax, "device_count", lambda: int(values.get("count", 1)))
        fingerprint._of_process.cache_clear()
        return fingerprint.digest("x")

    assert named() == named() != named(**{change: "2"})


@pytest.mark.parametrize("name", ["XLA_FLAGS", "MOSAIC_GPU_DUMP_PTX", "NVIDIA_TF32_OVERRIDE"])
def test_variables_that_change_programs_are_in_their_names(kept, monkeypatch, name):
    before = fingerprint.digest("x")
    monkeypatch.setenv(name, "--xla_cpu_enable_fast_math=true")
    fingerprint._of_process.cache_clear()
    assert fingerprint.digest("x") != before


def test_which_gpu_is_used_is_not_in_a_programs_name(kept, monkeypatch):
    before = fingerprint.digest("x")
    for name in ("CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION", "TF_CPP_MIN_LOG_LEVEL"):
        monkeypatch.setenv(name, "1")
    fingerprint._of_process.cache_clear()
    assert fingerprint.digest("x") == before


def test_a_developers_edit_is_in_a_programs_name(tmp_path, monkeypatch):
    fingerprint._of_process()
    monkeypatch.setattr(fingerprint, "_ROOT", tmp_path)
    (tmp_path / "pallas_kernels" / "op").mkdir(parents=True)
    (tmp_path / "gptjax").mkdir()
    source = tmp_path / "pallas_kernels" / "op" / "kernel.py"
    source.write_text("x = 1")
    before = fingerprint._sources()
    os.utime(source, (1, 1))
    assert fingerprint.sources_are_current()
    source.write_text("x = 2")
    assert fingerprint._sources() != before
    assert not fingerprint.sources_are_current()  # this process may have read it before
    os.utime(source, (1, 1))
    source.with_name(".#kernel.py").symlink_to("nowhere")  # as an editor leaves there
    assert fingerprint.sources_are_current()
    monkeypatch.setattr(fingerprint, "_ROOT", tmp_path / "none")
    assert not fingerprint.sources_are_current()


def test_nothing_is_kept_by_a_process_that_may_have_read_sources_before_an_edit(kept, monkeypatch):
    monkeypatch.setattr(fingerprint, "sources_are_current", lambda: False)
    material.results()
    assert not kept.exists()


def test_jaxs_settings_are_in_a_programs_name(kept):
    before = fingerprint.digest("x")
    with jax.numpy_dtype_promotion("strict"):
        assert fingerprint.digest("x") != before
    cached = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    try:
        assert fingerprint.digest("x") == before
    finally:
        jax.config.update("jax_compilation_cache_dir", cached)


def _damaged(content: bytes, how: str) -> bytes:
    middle = len(content) // 2
    return {
        "empty": b"",
        "short": content[:middle],
        "start": content[:50],
        "longer": content + b"x",
        "head": content[:100] + bytes([content[100] ^ 1]) + content[101:],
        "body": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        "foreign": b"something else\n" * 100,
    }[how]


@pytest.mark.parametrize("how", ["empty", "short", "start", "longer", "head", "body", "foreign"])
def test_a_damaged_file_is_replaced(kept, monkeypatch, caplog, how):
    expected, traced = material.results(), _traced(monkeypatch)
    before = {file: file.read_bytes() for file in kept.iterdir()}
    for file, content in before.items():
        file.write_bytes(_damaged(content, how))
    assert material.results() == expected
    assert "it is damaged" in caplog.text
    caplog.clear()
    traced.clear()
    assert material.results() == expected
    assert traced == []
    assert not caplog.records


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_file_that_cannot_be_unpickled_is_replaced(kept, monkeypatch, caplog, part):
    expected = material.results()
    files = Executables(material.made()[0])._files
    for file in kept.iterdir():
        parts = {"head": files.head(file.name), "body": files.body(file.name)} | {part: b"cnowhere\nnothing\n."}
        files.write(file.name, **parts)
    assert material.results() == expected
    assert "cannot be read: ModuleNotFoundError" in caplog.text
    caplog.clear()
    assert material.results() == expected
    assert not caplog.records


def test_donated_arguments_are_used_up_and_others_are_not(kept):
    params, pair = material.made()
    for _ in range(2):  # compiled, then read
        call = Executables(params)
        for _ in range(3):
            before = pair
            _, pair = call(material.mixed, params, pair, np.float32(1), 1)
            assert before.first.is_deleted()
            assert not params.leaves[0].is_deleted()


def test_without_jit_nothing_is_compiled(kept):
    params, pair = material.made()
    with jax.disable_jit():
        total, _ = Executables(params)(material.mixed, params, pair, np.float32(1), 1)
    assert np.isfinite(total)
    assert not kept.exists()


def test_parameters_on_several_devices_are_left_to_jit(kept, monkeypatch):
    params, pair = material.made()

    class Elsewhere:
        is_fully_addressable = True

        def devices(self):
            return set(jax.devices()) | {type("Device", (), {"id": 7})()}

    call = Executables(FlatParams((*params.leaves, Elsewhere()), params.tree))
    call(material.counted, pair)
    assert not kept.exists()
