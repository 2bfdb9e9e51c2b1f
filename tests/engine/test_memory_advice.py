"""What does not fit is refused before it is allocated, with what to try instead."""

import dataclasses
import re
import shutil

import jax
import pytest

import gptjax
from gptjax import CapacityError
from gptjax.config import PUBLISHED, GPT2Config
from gptjax.diagnostics.info import describe
from gptjax.engine import memory, steps
from gptjax.engine.limits import MemoryLimit
from gptjax.models import registry
from gptjax.support import runtime
from gptjax.support.runtime import DeviceMemory
from gptjax.support.units import readable
from tests.engine.memory_material import GIB, SMALL, TALES, device_of, give


def _total(config: GPT2Config, dtype: str, batch: int, length: int, device: DeviceMemory) -> int:
    model = registry.build(config, dtype=dtype)
    return memory.needed(model, batch=batch, max_length=length, device=device, state=True).total


@pytest.mark.parametrize(
    ("platform", "dtype", "batch", "at", "says"),
    [
        # (what fits exactly, as dtype, batch, length) -> what is said.
        ("gpu", "float32", 4, ("bfloat16", 4, 1024), r'^dtype="bfloat16" \(--dtype bfloat16\)$'),
        ("gpu", "bfloat16", 4, ("bfloat16", 4, 640), r"^max_length=640 \(--max-length 640\)$"),
        ("cpu", "float32", 16, ("float32", 16, 640), r"^max_length=640 \(--max-length 640\)$"),
        ("cpu", "bfloat16", 4, ("bfloat16", 4, 256), r"^max_length=256 "),
        ("gpu", "float32", 4, ("bfloat16", 4, 512), r'^dtype="bfloat16" .* with max_length=512 '),
    ],
)
def test_advice_is_the_most_that_fits(platform, dtype, batch, at, says):
    config, device = PUBLISHED["gpt2"], device_of(GIB, platform)
    has = _total(config, *at, device)
    model = registry.build(config, dtype=dtype)
    advice = memory.advice(model, batch=batch, max_length=1024, has=has, device=device, state=True)
    assert re.search(says, advice)
    assert memory.advice(model, batch=batch, max_length=1024, has=has - 1, device=device, state=True) != advice


def test_advice_for_fewer_rows_and_for_none_at_all():
    config, device = PUBLISHED["gpt2"], device_of(GIB, "gpu")
    model = registry.build(config, dtype="bfloat16")
    # A wide batch, of which not even the shortest rows fit; so few rows do.
    has = _total(config, "bfloat16", 50, 1024, device)
    advice = memory.advice(model, batch=1000, max_length=1024, has=has, device=device, state=True)
    assert advice == "max_batch=50 (--max-batch 50)"
    none = memory.advice(model, batch=1, max_length=1024, has=1000, device=device, state=True)
    assert none == f"a device with {readable(_total(config, 'bfloat16', 1, 1024, device))} free, or a smaller model"


def test_what_was_advised_fits_and_loads(demo, monkeypatch):
    rows = {"max_batch": 8, "dtype": "float32"}
    has = memory.needed(registry.build(TALES, dtype="float32"), batch=8, max_length=384, device=device_of(GIB)).least
    monkeypatch.setattr(runtime, "device_memory", lambda device=None: device_of(has))
    give(monkeypatch, device_of(has))
    with pytest.raises(CapacityError, match=r"needs .* has .* available; try max_length=384 ") as raised:
        gptjax.load(demo, **rows)
    assert readable(has) in str(raised.value)
    assert describe(demo, **rows)["fits"] == f"no; {str(raised.value).partition('; ')[2]}"
    assert (
        describe(demo, max_length=384, **rows)["fits"] == "yes, with room for 384 tokens in the cache instead of 3072"
    )
    gptjax.load(demo, max_length=384, **rows).close()


def test_advice_for_an_engine_is_the_length_that_one_row_fits():
    """All other rows share what is left, so their number hardly counts."""
    model, device = registry.build(PUBLISHED["gpt2"], dtype="bfloat16"), device_of(GIB, "gpu")
    sizes = {"batch": 16, "device": device}
    has = memory.needed(model, max_length=640, **sizes).least
    assert memory.needed(model, max_length=640, **sizes).total == has + 15 * 640 * 36_864
    said = memory.shortfall(model, max_length=1024, has=has, **sizes)
    assert re.search(r"needs at least .* cache of 1 row .* try max_length=640 ", said)
    assert memory.shortfall(model, max_length=640, has=has, **sizes) is None
    assert memory.shortfall(model, max_length=640, has=has - 1, **sizes) is not None


def test_a_share_of_the_device_is_all_that_may_be_used(monkeypatch):
    model = registry.build(SMALL)
    need = memory.needed(model, batch=1, max_length=70)
    give(monkeypatch, DeviceMemory("cpu", "cpu", 4 * need.least, 0, 4 * need.least))
    memory.check(model, batch=1, max_length=70, limit=MemoryLimit(share=0.25))
    with pytest.raises(CapacityError, match=rf"but 0.24 of the cpu has {re.escape(readable(24 * need.least // 25))}"):
        memory.check(model, batch=1, max_length=70, limit=MemoryLimit(share=0.24))


def test_too_large_is_said_before_any_weight_is_read(demo, tmp_path, monkeypatch):
    shutil.copytree(demo, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"")  # reading it would be a CheckpointError
    monkeypatch.setattr(memory, "device_memory", lambda device=None: device_of(10**6))
    with pytest.raises(CapacityError, match=r"has 1\.00 MB available; try a device with \d+\.\d\d MB free"):
        gptjax.load(tmp_path / "cut", dtype="float32")


def test_a_state_that_cannot_fit_is_refused_before_it_is_allocated(demo, monkeypatch):
    lm, other = (gptjax.load(demo, dtype="float32") for _ in range(2))
    with pytest.raises(CapacityError, match=r"needs \d+\.\d\d TB .* try max_batch=\d+ "):
        lm.init_state(batch=10**8)  # 1.3 PB
    need = lm.memory()
    exact = dataclasses.replace(device_of(need.cache + need.logits), platform=jax.default_backend())
    give(monkeypatch, exact)
    assert len(lm.generate([1, 2], max_tokens=2).token_ids) == 2
    give(monkeypatch, dataclasses.replace(exact, available=exact.available - 1))
    monkeypatch.setattr(steps, "init_state", None)  # it is not come to
    for call in (lambda: other.generate([1, 2]), lambda: next(other.stream([1, 2]))):
        with pytest.raises(CapacityError, match="try "):
            call()
    state = memory.needed(lm.model, batch=1, max_length=512, state=True)
    give(monkeypatch, dataclasses.replace(exact, available=state.cache + state.logits - 1))
    for call in (other.init_state, lm.init_state):
        with pytest.raises(CapacityError, match="try "):
            call()
