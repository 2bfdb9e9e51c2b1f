"""Shared by all tests: results must not depend on a machine's settings, and nothing may reach the network."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(scope="session", autouse=True)
def _own_programs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Compiled programs are this run's own; commands and servers that its tests start find them."""
    os.environ["GPTJAX_CACHE_DIR"] = str(tmp_path_factory.mktemp("programs"))


@pytest.fixture(scope="module", autouse=True)
def _programs_are_forgotten() -> Iterator[None]:
    """Linux gives a process 65,530 mappings of memory, a program takes several, and without any JAX crashes."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="session")
def demo() -> Path:
    """The directory of the small trained GPT-2."""
    return ROOT / "gptjax" / "demo" / "gpt2-tales"


@pytest.fixture(scope="session")
def lm():
    """The small trained GPT-2, in float32."""
    import gptjax

    return gptjax.load("gpt2-tales", dtype="float32")
