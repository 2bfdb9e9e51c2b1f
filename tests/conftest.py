"""Shared by all tests: no machine's settings, no network, compiled programs that are kept, and the tiers."""

import gc
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
for name in ("GPTJAX_MAX_LENGTH", "JAX_COMPILATION_CACHE_DIR", "HF_HOME", "HF_HUB_CACHE"):
    os.environ.pop(name, None)
os.environ["GPTJAX_NO_PROGRESS"] = "1"
# On GPUs the default rounds float32 products to TF32, which no comparison here allows for. Read when JAX is imported.
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
if "jax" in sys.modules:  # a plugin of pytest was earlier
    sys.modules["jax"].config.update("jax_default_matmul_precision", "highest")

ROOT = Path(__file__).resolve().parent.parent
# Compiled programs are kept from run to run: their keys are the program's text, the compiler's version and its flags.
PROGRAMS = ROOT / "build" / "programs"
os.environ["GPTJAX_CACHE_DIR"] = str(PROGRAMS)  # for commands and servers that tests start, too
MOST_BYTES = 1 << 30
MOST_MAPPINGS = 8_000  # of the 65,530 that Linux gives a process; so many programs take about 2 GB

# Folders and files of tests/ by what they cost. All others compile nothing large: `make quick`.
MODELS = {  # compile models, or kernels that XLA compiles, or take long: `make test` has them and the quick ones
    "bench",
    "cli/test_cli.py",
    "cli/test_chat_interrupts.py",
    "config/test_overrides.py",
    "convert/test_conversion_memory.py",
    "convert/test_convert_mxfp4.py",
    "convert/test_killed_conversions.py",
    "convert/test_original.py",
    "convert/test_resumed_conversions.py",
    "diagnostics",
    "engine",
    "hostile/test_fuzz_formats.py",
    "layers",
    "models",
    "pallas_kernels",
    "server/test_bounds.py",
    "server/test_disconnects.py",
    "server/test_endings.py",
    "server/test_serving.py",
    "server/test_with_model.py",
    "server/test_worker.py",
    "server/test_worker_calls.py",
    "server/test_worker_ends.py",
    "sharding/test_hosts.py",
    "sharding/test_on_eight_devices.py",
    "test_affected.py",  # imports each module anew
    "test_api.py",
    "test_chat.py",
    "test_chat_models.py",
    "test_docs.py",
    "test_fork.py",
    "test_loading.py",
    "test_pictures.py",
    "test_quoted_messages.py",
}
KERNELS = {  # interpret GPU kernels, or lower for CUDA or TPUs: `make kernels` has all of pallas_kernels
    "engine/test_lowering_for_tpu.py",
    "pallas_kernels/attention/decode",
    "pallas_kernels/attention/prefill",
    "pallas_kernels/matvec/test_matvec_triton.py",
    "pallas_kernels/moe/test_moe_triton.py",
    "pallas_kernels/test_mosaic.py",
}
OTHERS = {"oracle"}  # need other packages, and a command of their own; tests/affected.py leaves them out itself
# On a CPU, XLA compiles these as users' programs: they are about bits, tolerances, what is copied, or speed, or they
# generate hundreds of tokens. All others, and the processes that they start, compile with little optimisation, which
# takes half as long: they are about who gets what and when, of programs that are run a few times. (A row's bits depend
# on it: additions are not fused with products.) What is interpreted runs on GPUs only; what agrees with transformers is
# compared with float64 in tests/models; what a program needs of memory does not depend on it.
OPTIMIZED = {
    "convert/test_convert_mxfp4.py",
    "engine/test_engine_speeds.py",
    "engine/test_free_of_load.py",
    "engine/test_in_place.py",
    "models/test_golden_gpt2.py",
    "models/test_golden_gpt_oss.py",
    "models/test_precision.py",
    "pallas_kernels/test_row_alone.py",
    "pallas_kernels/test_same_bits.py",
    "server/test_load.py",
    "server/test_load_speeds.py",
    "server/test_with_model.py",  # the programs of test_worker.py
    "server/test_worker.py",
    "server/test_worker_calls.py",
    "server/test_worker_ends.py",
    "sharding/eight_devices_data.py",
    "test_chat.py",
}
# `make full` compiles these as users' programs, too; the other tiers do not. Most are compared with float64, within
# tolerances; of the engine's, all steps compute the same rows.
COMPARED = {
    "engine/test_dispatches.py",
    "engine/test_sampling.py",
    "engine/test_sampling_bounds.py",
    "engine/test_steps_per_dispatch.py",
    "models/test_gpt2.py",
    "models/test_gpt_oss.py",
    "models/test_llama.py",
    "models/test_packed_gguf.py",
    "pallas_kernels/add_norm",
    "pallas_kernels/attention/test_attention.py",
    "pallas_kernels/attention/test_lanes.py",
    "pallas_kernels/block",
    "pallas_kernels/logits",
    "pallas_kernels/matmul",
    "pallas_kernels/matvec/test_packed_matvec.py",
    "pallas_kernels/matvec/test_packed_row.py",
    "pallas_kernels/moe/test_moe.py",
    "pallas_kernels/pages",
    "test_api_rows.py",
}
# Files that run each other's programs. One process has them all, or two would compile the same at the same time.
TOGETHER = {
    "steps": {"engine/test_dispatches.py", "engine/test_steps_per_dispatch.py"},
    "calls": {"engine/test_executor.py", "engine/test_warm_up.py"},
    "worker": {
        "server/test_with_model.py",
        "server/test_worker.py",
        "server/test_worker_calls.py",
        "server/test_worker_ends.py",
    },
    "demo": {"test_api.py", "test_api_rows.py", "test_chat_models.py", "test_docs.py", "test_loading.py"},
}
# What each tier leaves out; all but the last the tests marked `thorough`, too.
TIERS = {"quick": MODELS | KERNELS | OTHERS, "test": KERNELS | OTHERS, "affected": set(), "full": set()}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tier", choices=TIERS, default="full", help="which tests: see tests/conftest.py")


def pytest_configure(config: pytest.Config) -> None:
    # XLA's former generators of loops compile an engine's programs in 60 percent of the time that MLIR's take. Newer
    # versions have only MLIR's, and abort at the flag. Of these marks, all tests compile with little optimisation.
    former = tuple(int(part) for part in version("jaxlib").split(".")[:2]) < (0, 11)
    if former and config.getoption("markexpr") in ("oracle", "clients") and "XLA_FLAGS" not in os.environ:
        os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"
    # A program that another process is just writing is compiled again.
    config.addinivalue_line("filterwarnings", "ignore:Error reading persistent compilation cache:UserWarning")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files of higher tiers; and for `-m MARK`, those without that mark, as importing all takes long."""
    if collection_path.relative_to(ROOT / "tests").as_posix() in TIERS[config.getoption("tier")]:
        return True
    mark = config.getoption("markexpr")
    if mark.isidentifier() and collection_path.suffix == ".py" and f"mark.{mark}" not in collection_path.read_text():
        return True
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if config.getoption("tier") != "full" and item.get_closest_marker("thorough")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files, but those that are `TOGETHER`, go to whichever process is free."""
    from xdist.scheduler import LoadFileScheduling

    groups = {f"tests/{name}": group for group, names in TOGETHER.items() for name in names}

    class Together(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return groups.get(file, file)

    return Together(config, log)


def pytest_collection_finish() -> None:
    """Looking for garbage among a million objects that stay was a sixth of all time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


@pytest.fixture(scope="module", autouse=True)
def _programs_are_kept(request: pytest.FixtureRequest) -> Iterator[None]:
    """On disk, and in memory while there is room: without mappings of memory, JAX crashes."""
    if "jax" in sys.modules:
        jax = sys.modules["jax"]
        jax.config.update("jax_compilation_cache_dir", str(PROGRAMS / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.02)
        if "gptjax.support.runtime" in sys.modules:
            # Or each engine would read its programs anew, which takes three times as long as loading the model.
            sys.modules["gptjax.support.runtime"]._executables = None
        names = OPTIMIZED | COMPARED if request.config.getoption("tier") == "full" else OPTIMIZED
        optimized = any(request.path.is_relative_to(ROOT / "tests" / name) for name in names)
        unoptimized = jax.default_backend() == "cpu" and not optimized
        if unoptimized != jax.config.read("jax_disable_most_optimizations"):
            jax.config.update("jax_disable_most_optimizations", unoptimized)
            os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(unoptimized)
            jax.clear_caches()
    yield
    if "jax" in sys.modules and _mappings() > MOST_MAPPINGS:
        sys.modules["jax"].clear_caches()


def _mappings() -> int:
    """The mappings of memory that this process has; 0 if the system does not say."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0


def pytest_sessionstart(session: pytest.Session) -> None:
    """Removes the oldest programs beyond `MOST_BYTES`. Workers of a run leave that to the process that starts them."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        return
    kept = 0
    for path in sorted(PROGRAMS.glob("*/*"), key=lambda path: path.stat().st_mtime, reverse=True):
        kept += path.stat().st_size
        if kept > MOST_BYTES:
            path.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def demo() -> Path:
    """The directory of the small trained GPT-2."""
    return ROOT / "gptjax" / "demo" / "gpt2-tales"


@pytest.fixture(scope="session")
def lm():
    """The small trained GPT-2, in float32."""
    import gptjax

    return gptjax.load("gpt2-tales", dtype="float32")
