"""Kernels alone: the cases against oracles and counts by hand, what a chain keeps, the plot, and the command."""

import dataclasses
import importlib.util
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import gptjax
from gptjax.bench import cases, kernels, roofline
from gptjax.bench.cases import Attention, Block, Experts, Prefill, Product, product
from gptjax.bench.cases.block import Carried
from gptjax.bench.figure import Figure
from gptjax.bench.kernels import Ceilings, KernelResult, NotRun
from gptjax.cli import main
from gptjax.config import PUBLISHED
from pallas_kernels.fp8_pages import Fp8Pages
from pallas_kernels.pages import PAGE
from tests.oracles import attention_numpy, block_numpy, moe_numpy
from tests.thinned import thinned

pytestmark = pytest.mark.usefixtures("short")
PRODUCT = Product(3, "float32", 40, 700)
EXPERTS = Experts(3, "float32", 96, 64, 7, 2, packed=True, alpha=1.702, limit=7.0)
FULL = Attention(5, "float32", 6, 2, 16, 150, windowed=False, sinks=False)
WINDOW = Attention(2, "float32", 6, 2, 16, 150, windowed=True, sinks=True)
BLOCK = Block(5, "float32", 3, 64, 320, 150, block_numpy.EPSILON)
PROMPT = Prefill(2, "float32", 6, 2, 16, tokens=9, prior=130, window=20, sinks=True)
UNBALANCED = dataclasses.replace(EXPERTS, rows=40, balanced=False)
IN_FLOAT8 = [dataclasses.replace(each, cache_dtype="fp8") for each in (WINDOW, PROMPT)]
CASES = [PRODUCT, EXPERTS, UNBALANCED, FULL, WINDOW, BLOCK, PROMPT, *IN_FLOAT8]
CEILINGS = Ceilings(copy=4e9, read=5e9, flops=1e12, link=1e-6)


@pytest.fixture
def ceilings(monkeypatch):
    monkeypatch.setattr(kernels, "measure_ceilings", lambda dtype: CEILINGS)


# Cases


def _shapes(operation: str, *names: str, **options: Any) -> list[tuple[str, int]]:
    models = {name: PUBLISHED[name] for name in names}
    found = cases.cases(models, dtype="bfloat16", operations=[operation], **options)
    return [(case.shape, case.rows) for case in found]


def test_the_cases_are_the_shapes_of_the_models():
    products = _shapes("matvec", "gpt-oss-20b", "gpt-oss-120b")
    assert products == [(shape, rows) for shape in ("2880→5120", "4096→2880", "2880→201088") for rows in (1, 8, 32)]
    assert {shape for shape, _ in _shapes("matvec", "gpt2", "gpt2-xl")} == {
        *("768→2304", "768→768", "768→3072", "3072→768", "768→50257"),
        *("1600→4800", "1600→1600", "1600→6400", "6400→1600", "1600→50257"),
    }
    assert _shapes("moe", "gpt-oss-20b") == [("4 of 32: 2880→2·2880→2880, MXFP4", rows) for rows in (1, 8, 32, 128)]
    assert _shapes("moe", "gpt2", "gpt-oss-120b", prompts=True) == [
        *(("4 of 128: 2880→2·2880→2880, MXFP4", rows) for rows in (1, 8, 32, 128, 512, 2048, 16384)),
        *(("4 of 128: 2880→2·2880→2880, MXFP4, unbalanced", rows) for rows in (512, 2048, 16384)),
    ]
    attention = _shapes("attention", "gpt-oss-20b", "gpt-oss-120b")
    for rows, positions in ((1, "2048"), (1, "32768"), (8, "2048"), (32, "512"), (8, "128 of a window")):
        assert (f"64 heads on 8·64, {positions}", rows) in attention
    assert len(set(attention)) == len(attention)
    assert _shapes("attention", "gpt2") == [("12 heads on 12·64, 512", rows) for rows in (1, 8, 32)]
    assert _shapes("block", "gpt2", "gpt-oss-20b", "gpt2-xl") == [
        (shape, rows)
        for shape in ("12 heads of 64, 768→3072→768, 512", "25 heads of 64, 1600→6400→1600, 512")
        for rows in (1, 8)
    ]


def test_models_share_cases_and_other_sizes_can_be_asked_for():
    models = {name: PUBLISHED[name] for name in ("gpt-oss-20b", "gpt-oss-120b")}
    found = cases.cases(models, dtype="bfloat16", operations=["matvec"], rows=[5])
    assert set(map(tuple, found.values())) == {("gpt-oss-20b", "gpt-oss-120b")}
    assert {case.rows for case in found} == {5}
    assert _shapes("attention", "gpt2", rows=[2], positions=[64, 1000, 2000]) == [
        (f"12 heads on 12·64, {positions}", 2) for positions in (64, 1000)
    ]
    block = "12 heads of 64, 768→3072→768, 64"
    assert _shapes("block", "gpt2", rows=[2], positions=[64, 2000]) == [(block, 2)]
    assert _shapes("moe", "gpt2") == []


@pytest.mark.parametrize("other", [{"activation": "relu"}, {"mxfp4": "linear"}, {"num_heads": 6}], ids=str)
def test_other_blocks_than_those_that_the_operation_means_are_none_of_it(other):
    config = dataclasses.replace(PUBLISHED["gpt2"], **other)
    assert cases.cases({"other": config}, dtype="bfloat16", operations=["block"]) == {}


def test_bytes_and_flops_are_those_counted_by_hand():
    product = Product(8, "bfloat16", 2880, 5120)
    assert (product.bytes, product.flops) == (2880 * 5120 * 2, 2 * 8 * 2880 * 5120)
    expert = 3 * 2880 * 2880
    for rows, touched in ((1, 4), (128, 32)):
        case = Experts(rows, "bfloat16", 2880, 2880, 32, 4, packed=True, alpha=1.702, limit=7.0)
        assert (case.bytes, case.flops) == (touched * expert * 17 // 32, 2 * 4 * rows * expert)
    cache = Attention(8, "bfloat16", 64, 8, 64, 2048, windowed=False, sinks=True)
    assert cache.bytes == 8 * 2 * 8 * 2048 * 64 * 2
    assert cache.flops == 8 * 2 * 2 * 64 * 2048 * 64
    block = Block(8, "bfloat16", 12, 64, 3072, 512, 1e-5)
    weights = 768 * (3 * 768 + 768 + 3072 + 3072)
    assert block.bytes == 2 * (weights + 8 * 2 * 512 * 768)
    assert block.flops == 8 * 2 * (weights + 2 * 512 * 768)


def test_experts_are_chosen_alike_or_badly_balanced():
    case = Experts(4096, "bfloat16", 2880, 2880, 32, 4, packed=True, alpha=1.702, limit=7.0)
    counts = []
    for each in (case, dataclasses.replace(case, balanced=False)):
        experts_TX = each._experts_TX
        assert all(len(set(experts)) == 4 for experts in experts_TX[:100].tolist())
        counts.append(np.bincount(experts_TX.ravel(), minlength=32))
    assert 0.8 * 512 < counts[0].min() <= counts[0].max() < 1.2 * 512  # the average is 512
    assert counts[1].max() > 5 * 512
    assert counts[1].min() < 512 / 5


@pytest.mark.parametrize("implementation", thinned(["xla", "mosaic"], "mosaic"))
def test_every_case_of_full_size_has_operands_that_fit(implementation):
    """Nothing is computed. Of an implementation there is only its layout of the weights, which this must not break."""
    models = {name: PUBLISHED[name] for name in ("gpt2", "gpt2-xl", "gpt-oss-20b", "gpt-oss-120b")}
    for case in cases.cases(models, dtype="bfloat16", prompts=True):
        x, (operands,) = jax.eval_shape(lambda case=case: (case.x(1), case.copies(1, implementation)))
        if case.operation != "moe":
            leaves = jax.tree.leaves((operands, x.caches) if isinstance(case, Block) else operands)
            read = [leaf for leaf in leaves if leaf.dtype == jnp.bfloat16 and leaf.ndim > 1]
            held = 2 * sum(leaf.size for leaf in read)
            has_more = isinstance(case, Attention | Block | Prefill)  # than is read
            assert held >= case.bytes if has_more else held == case.bytes
        if implementation == "xla":
            out = jax.eval_shape(lambda x, operands, case=case: case.call(x, operands, "xla"), x, operands)
            following = jax.eval_shape(case.following, x, out)
            assert _avals(following) == _avals(x)


def _avals(tree: Any) -> list[tuple[Any, Any]]:
    return [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


def _numbers(packed: Any) -> np.ndarray:
    return np.asarray(packed.dequantize(), np.float64).swapaxes(1, 2)


def _oracle(case: Any, x: Any, operands: Any) -> Any:
    if isinstance(case, Block):
        caches = [_together(pool, x.table_TZ) for pool in x.caches[operands.copy]]
        given = block_numpy.Operands(x.stream, operands.weights, x.positions_T, *caches)
        x_TD, _, _ = block_numpy.block(given, jnp.float32)
        return dataclasses.replace(x, stream=dataclasses.replace(x.stream, x_TD=x_TD))
    if isinstance(case, Attention | Prefill):
        return _attended(case, x, operands)
    x = np.asarray(x, np.float64)
    if case is PRODUCT:
        return x @ np.asarray(operands, np.float64)
    if case in (EXPERTS, UNBALANCED):
        experts, weights, up, up_bias, down, down_bias = operands
        settings = {"alpha": case.alpha, "limit": case.limit}
        return moe_numpy.moe(
            x, np.asarray(experts), weights, _numbers(up), up_bias, _numbers(down), down_bias, **settings
        )
    raise AssertionError(case)


def _attended(case: Any, x: Any, operands: Any) -> np.ndarray:
    sinks = None if operands[2] is None else np.asarray(operands[2])
    k, v = (_together(_read(pool), x.table_BZ) for pool in operands[:2])
    k_positions = np.broadcast_to(np.arange(k.shape[2]), (len(k), k.shape[2]))
    window = case.window if isinstance(case, Prefill) else case.positions if case.windowed else None
    given = np.asarray(x.q_BTNH, np.float64), k, v, np.asarray(x.q_positions_BT), k_positions, sinks
    return attention_numpy.attention(*given, scale=0.25, window=window)


def _read(pool: Any) -> Any:
    if not isinstance(pool, Fp8Pages):
        return pool
    numbers = np.asarray(pool.numbers_YKSH).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return numbers * 2.0 ** (np.asarray(pool.exponents_YKS1).astype(int) - 127)


def _together(pool: Any, table_BZ: Any) -> np.ndarray:
    rows = [np.concatenate([np.asarray(pool)[page] for page in pages], axis=1) for pages in np.asarray(table_BZ)]
    return np.stack(rows)


@pytest.mark.parametrize(
    "case", thinned(CASES, PRODUCT, EXPERTS, WINDOW), ids=lambda case: f"{case.operation} {case.shape}"
)
def test_what_is_expected_is_what_the_oracle_says(case):
    x, copies = case.x(2), case.copies(2, "xla")
    call = jax.jit(lambda x, operands: case.sample(case.call(x, operands, "xla")))
    for operands in copies:
        oracle = np.asarray(case.sample(_oracle(case, x, operands)))
        np.testing.assert_allclose(case.expected(x, operands), oracle, rtol=0, atol=1e-12)
        with jax.default_matmul_precision("highest"):
            out = np.asarray(call(x, operands))
        np.testing.assert_allclose(out, oracle, rtol=0, atol=1e-4 * np.abs(oracle).max())
    assert not np.array_equal(*(case.expected(x, operands) for operands in copies))


def test_experts_take_turns():
    copies = Experts(1, "float32", 32, 32, 8, 2, packed=False, alpha=1.0, limit=7.0).copies(4, "xla")
    assert sorted(np.concatenate([operands[0] for operands in copies], axis=None).tolist()) == list(range(8))
    assert all(operands[2] is copies[0][2] for operands in copies)
    touched = {len(np.unique(operands[0])) for operands in EXPERTS.copies(7, "xla")}
    assert len(touched) == 1


# Measuring


def _named(case: Any, implementation: str = "xla", **changes: Any) -> KernelResult:
    facts = {"call": Figure((2e-6, 1e-6, 4e-6)), "error": 1e-3, "apart": 10**9, "models": ("some",)}
    return KernelResult(case=case, implementation=implementation, **{**facts, **changes})


def test_a_result_is_told_by_its_median():
    result = _named(Product(8, "bfloat16", 100, 50))
    assert result.bytes_per_second == pytest.approx(2 * 100 * 50 / 2e-6)
    assert result.flops_per_second == pytest.approx(2 * 8 * 100 * 50 / 2e-6)
    assert result.intensity == 8
    facts = json.loads(json.dumps(result.to_json(10e9)))
    assert facts["share_of_ceiling"] == pytest.approx(0.5)
    assert (facts["inputs"], facts["outputs"], facts["rows"], facts["cached"]) == (100, 50, 8, False)
    assert _named(PRODUCT, apart=1000).cached


@pytest.mark.parametrize(
    "case", thinned(CASES, PRODUCT, EXPERTS, WINDOW), ids=lambda case: f"{case.operation} {case.shape}"
)
def test_each_call_of_a_chain_waits_for_the_one_before(case):
    """What the first call is given, such as NaN, reaches the last."""
    operands = case.copies(3, "xla")
    program = kernels._program(lambda x, each: case.call(x, each, "xla"), case.following)
    assert np.isfinite(_rows(program(case.x(3), operands))).all()
    assert np.isnan(_rows(program(jax.tree.map(_poisoned, case.x(3)), operands))).any()
    middle = [operands[0], jax.tree.map(_poisoned, operands[1]), operands[2]]
    assert np.isnan(_rows(program(case.x(3), middle))).any()


def _rows(x: Any) -> jax.Array:
    """Of what a call gives the next, without the caches, of which each copy has its own."""
    return BLOCK.sample(x) if isinstance(x, Carried) else getattr(x, "q_BTNH", x)


def _poisoned(leaf: jax.Array) -> jax.Array:
    return jnp.full_like(leaf, jnp.nan) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def test_no_call_of_a_chain_is_left_out_or_made_smaller():
    """XLA would merge products of the same weight, and of a result of which a column is used compute that column."""
    case = Product(64, "float32", 40, 704)
    (kernel,) = case.copies(1, "xla")
    program = kernels._program(lambda x, each: case.call(x, each, "xla"), case.following)
    text = program.lower(case.x(1), [kernel] * 5).compile().as_text()
    results = [line for line in text.splitlines() if re.search(r"f32\[(1,)?64,704\]", line)]
    products = [line for line in results if " dot(" in line or "gemm" in line]
    assert len(products) == 5


def test_a_chain_of_blocks_updates_caches_in_place():
    """Each copy of a cache would be in the time."""
    program = kernels._program(lambda x, each: BLOCK.call(x, each, "xla"), BLOCK.following)
    x, copies = BLOCK.x(2), BLOCK.copies(2, "xla")
    compiled = program.lower(x, [copies[turn % 2] for turn in range(5)]).compile()
    cache = x.caches[0][0]
    assert compiled.memory_analysis().alias_size_in_bytes >= 4 * cache.nbytes
    shape = f"f32[{','.join(map(str, cache.shape))}]"
    assert not re.findall(rf"= {re.escape(shape)}\S* copy\(", compiled.as_text())
    old = [np.asarray(leaf) for leaf in jax.tree.leaves(x.caches)]
    written = [(page, BLOCK.positions - 1 - PAGE) for page in sorted(np.asarray(x.table_TZ)[:, 1])]
    for before, after in zip(old, jax.tree.leaves(program(x, copies).caches), strict=True):
        np.testing.assert_array_equal(np.argwhere((after != before).any(axis=(1, 3))), written)  # pages and places


def test_a_following_input_is_the_one_before():
    x = jnp.linspace(-3, 3, 8).reshape(2, 4).astype(jnp.bfloat16)
    np.testing.assert_array_equal(cases.link(x, jnp.ones((2, 9))), x)


@pytest.mark.parametrize(
    "case", thinned(CASES, PRODUCT, EXPERTS, WINDOW), ids=lambda case: f"{case.operation} {case.shape}"
)
def test_right_results_have_no_error_to_speak_of_and_what_cannot_run_is_told(case):
    with jax.default_matmul_precision("highest"):
        result, missing = kernels.run({case: ["one", "other"]}, ["xla", "cuda"], repeats=5)
    assert isinstance(result, KernelResult) and isinstance(missing, NotRun)
    assert result.models == ("one", "other")
    assert len(result.call.seconds) == 5
    assert result.error < 1e-6
    operation = "attention" if case.operation == "prefill" else case.operation
    assert f"{operation} has no implementation 'cuda'" in missing.reason
    assert json.loads(json.dumps(missing.to_json()))["implementation"] == "cuda"


def test_wrong_results_have_an_error(monkeypatch):
    right = product.matvec
    monkeypatch.setattr(product, "matvec", lambda *args, **options: 1.25 * right(*args, **options))
    (result,) = kernels.run({PRODUCT: ["one"]}, ["xla"], repeats=1)
    assert result.error == pytest.approx(0.25, rel=1e-3)


def test_the_ceilings_are_the_devices():
    ceilings = kernels.measure_ceilings("float32")
    assert 1e8 < ceilings.read < 1e13 and 1e8 < ceilings.copy < 1e13
    assert 1e8 < ceilings.flops < 1e16
    assert 0 < ceilings.link < 1e-3
    assert ceilings.bytes_per_second == max(ceilings.read, ceilings.copy)


# The plot and the command


def test_a_plot(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    results = [_named(case, name) for case in CASES for name in ("xla", "mosaic")]
    roofline.plot(results, CEILINGS, tmp_path / "roof.png", title="some device")
    assert (tmp_path / "roof.png").read_bytes().startswith(b"\x89PNG")
    roofline.plot(results[:1], CEILINGS, tmp_path / "roof.svg", title="some device")
    (tmp_path / "roof.pdf").mkdir()
    with pytest.raises(gptjax.RequestError, match="cannot be written"):
        roofline.plot(results, CEILINGS, tmp_path / "roof.pdf", title="some device")


def test_the_command_prints_a_table_and_json(ceilings, capsys):
    short = ["gpt-oss-tales", "--kernels", "matvec", "attention", "--batch", "2", "--repeats", "2"]
    assert main(["bench", *short]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "4.00 GB/s" in lines[0] and "5.00 GB/s" in lines[0] and "1.0 µs" in lines[1]
    assert [line.split()[0] for line in lines[3:]] == ["matvec"] * 3 + ["attention"] * 2
    assert main(["bench", *short, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [result["operation"] for result in facts["results"]] == ["matvec"] * 3 + ["attention"] * 2
    assert facts["ceiling_bytes_per_second"] == 5e9
    assert facts["not_run"] == []
    assert len(facts["results"][0]["runs"]) == 2


def test_the_command_plots(ceilings, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    argv = ["gpt2-tales", "--kernels", "attention", "--batch", "1", "--repeats", "1", "--plot", str(tmp_path / "a.png")]
    assert main(["bench", *argv]) == 0
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--plot", "a.png"], "use it with --kernels"),
        (["--tune", "--kernels", "--plot", "a.png"], "without --tune"),
        (["--kernels", "--plot", "a.txt"], ".png, .pdf or .svg"),
        (["--kernels", "--versus", "transformers"], "leave out --kernels"),
        (["--tune", "--cache-dtype", "fp8"], "leave out --tune"),
        (["--random", "gpt2", "--quantize", "Q8_0", "--kernels"], "--tune"),
        (["--random", "gpt2", "--quantize", "Q8_0", "--versus", "transformers"], "leave out --write-random, --versus"),
        (["gpt2-tales", "--quantize", "mxfp4"], "name a size with --random"),
        (["--random", "smollm2-135m", "--quantize", "Q4_K"], "rows of 576; choose a type with smaller blocks"),
        (["--tune", "--json"], "leave out --json"),
        (["--kernels", "gpt2"], "unknown operation 'gpt2'; choose from moe, matvec, attention, block, prefill"),
        (["gpt2-tales", "--kernels", "moe"], "gpt2-tales has none of moe"),
        (["gpt-oss-tales", "--kernels", "block"], "gpt-oss-tales has none of block"),
        (["--random", "gpt5", "--kernels"], "gpt2-xl"),
        (["--kernels", "--batch", "0"], "--batch must be at least 1"),
        (["gpt2-tales", "--tune"], "has settings to tune"),
        (["--tune", "tiles.txt"], "--tune tiles.json"),
        (["--tune", "no/such/tiles.json"], "--tune tiles.json"),
    ],
)
def test_bad_arguments_name_the_fix(capsys, monkeypatch, argv, says):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert main(["bench", *argv]) == 1
    captured = capsys.readouterr()
    assert says in captured.err and not captured.out
