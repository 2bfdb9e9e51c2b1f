"""`gptjax bench --tune`: settings that are tried, and the fastest that is right."""

import math
import sys
import types

import jax
import jax.numpy as jnp
import pytest

from gptjax.bench import cases, kernels, tuning
from gptjax.bench.cases import Product, product
from gptjax.bench.figure import Figure
from gptjax.bench.kernels import NotRun
from gptjax.bench.tuning import Attempt
from gptjax.cli import main
from pallas_kernels import tiles

pytestmark = pytest.mark.usefixtures("short")
PRODUCT = Product(3, "float32", 40, 700)


@pytest.fixture
def tunable(monkeypatch):
    """`matvec` of an implementation that reads its settings: it is as slow as they say, wrong or out of memory."""
    right = product.matvec

    def matvec(x_TD, kernel_DN, *, transposed, implementation):
        settings = tiles.lookup("cpu", f"matvec/{implementation}", {"rows": len(x_TD), "in": x_TD.shape[1]})
        settings = settings or {"times": 1}
        if settings["times"] > 1000:
            raise RuntimeError("out of shared memory\nlong trace")
        out = right(x_TD, kernel_DN, transposed=transposed, implementation="xla")
        if settings["times"] == 0:
            return jnp.zeros_like(out)
        for _ in range(settings["times"]):
            out = jax.lax.optimization_barrier(out) @ jnp.full((700, 700), 1 / 700) * 1e-9 + out
        return out

    module = types.ModuleType("pallas_kernels.matvec.fake")
    module.tunable = lambda shape: [{"times": times} for times in (30, 0, 1, 2000, 60)]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(product, "matvec", matvec)
    return tiles.key("matvec/fake", {"rows": 3, "in": 40})


def test_settings_are_tried_and_the_fastest_that_is_right_is_taken(tunable):
    tried = list(tuning.tune(PRODUCT, "fake", repeats=3))
    attempts = [each for each in tried if isinstance(each, Attempt)]
    (unfit,) = (each for each in tried if isinstance(each, NotRun))
    assert unfit.reason == "{'times': 2000}: out of shared memory"
    assert [each.settings["times"] for each in attempts] == [30, 0, 1, 60]
    assert {each.key for each in attempts} == {tunable}
    (entry,) = tuning.fastest(attempts)
    assert (entry.key, entry.settings, entry.jax) == (tunable, {"times": 1}, jax.__version__)
    assert entry.microseconds > 0


def test_settings_that_give_nan_are_never_taken():
    key = tiles.key("matvec/fake", {"rows": 1})
    times = Figure((1e-6,)), Figure((2e-6,))
    attempts = [Attempt(key, {"a": 1}, times[0], math.nan), Attempt(key, {"a": 2}, times[1], 1e-3)]
    assert [entry.settings for entry in tuning.fastest(attempts)] == [{"a": 2}]
    assert tuning.fastest(attempts[:1]) == []


def test_what_has_no_settings_is_not_tuned():
    assert list(tuning.tune(PRODUCT, "xla", repeats=1)) == []
    (missing,) = tuning.tune(PRODUCT, "cuda", repeats=1)
    assert isinstance(missing, NotRun)


def test_the_command_tunes(tunable, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(kernels, "implementations", lambda: ("fake",))
    monkeypatch.setattr(cases, "cases", lambda *args, **options: {PRODUCT: ["some"]})
    file = tmp_path / "some.json"
    assert main(["bench", "--tune", str(file), "--repeats", "3"]) == 0
    out = capsys.readouterr().out
    assert "{'times': 30}" in out and "not run: {'times': 2000}: out of shared memory" in out
    (entry,) = tiles.read(file)
    assert (entry.key, entry.settings) == (tunable, {"times": 1})
    file.write_text("{}")
    tiles.read.cache_clear()
    assert main(["bench", "--tune", str(file)]) == 1
    assert "must be a list" in capsys.readouterr().err
