"""`pallas_kernels.block` against float64 NumPy. The kernel is lowered everywhere, and run on Hopper."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import PUBLISHED
from gptjax.engine import steps
from gptjax.models import registry
from gptjax.models.params import random_params
from pallas_kernels import block as package
from pallas_kernels import dispatch
from pallas_kernels.block import api
from pallas_kernels.block.stream import moments
from pallas_kernels.formats.mxfp4 import MXFP4
from tests.oracles import block_numpy
from tests.oracles.block_numpy import EPSILON, SCALE, Operands
from tests.oracles.paged import in_pages
from tests.pallas_kernels.marks import lowered, needs_hopper, needs_mosaic
from tests.thinned import thinned, thorough

run = partial(package.block, epsilon=EPSILON, scale=SCALE)
SHAPES = [(25, 1, 1024), (12, 1, 1024), (12, 8, 1024), (25, 8, 640), (16, 3, 640), (20, 2, 256), (12, 5, 72), (4, 4, 8)]
SHAPES += [(13, 6, 72), (8, 7, 16), (1, 1, 8)]


def _in_pages(given: Operands, seed: int = 0) -> tuple[Any, ...]:
    """What `run` takes: the caches' NaN stay NaN, and so does every page that is nobody's."""
    positions = np.asarray(given.positions_T)
    pools = []
    for cache in (given.k_TNSH, given.v_TNSH):
        pool, table = in_pages(np.asarray(cache.astype(jnp.float32)), positions, seed)
        pools.append(jnp.asarray(pool).astype(cache.dtype))
    return (*given[:3], *pools, jnp.asarray(table))


def _together(given: Operands, operands: tuple[Any, ...], result: tuple[Any, ...]) -> tuple[Any, ...]:
    """The stream, and each row's places one after the other; other pages than the rows' must be as they were."""
    *_, k, v, table = operands
    table, S, caches = np.asarray(table), given.k_TNSH.shape[2], []
    for before, after, like in zip((k, v), result[1:], (given.k_TNSH, given.v_TNSH), strict=True):
        before, after = (np.asarray(each.astype(jnp.float32)) for each in (before, after))
        nobodys = np.setdiff1d(np.arange(len(before)), table[table > 0])
        np.testing.assert_array_equal(after[nobodys], before[nobodys])
        cache = np.array(like.astype(jnp.float32))
        for row, pages in enumerate(table):
            for block, page in enumerate(pages[pages > 0]):
                places = slice(128 * block, min(128 * (block + 1), S))
                cache[row, :, places] = after[page][:, : places.stop - places.start]
        caches.append(jnp.asarray(cache).astype(like.dtype))
    return result[0], *caches


def _check(given: Operands, result: tuple[Any, ...], dtype: Any, allowed: float) -> None:
    stream, k_TNSH, v_TNSH = result
    expected, k_TNH, v_TNH = block_numpy.block(given, dtype)
    x = np.asarray(given.stream.x_TD.astype(jnp.float32), np.float64)
    actual = np.asarray(stream.x_TD.astype(jnp.float32), np.float64)
    # Of what is added, strip by strip: x itself is the larger part of the sum, and exact.
    difference, added = ((each - base).reshape(len(x), -1, 64) for each, base in ((actual, expected), (expected, x)))
    difference[:, 0, 0] = added[:, 0, 0] = 0  # where x is so large that little else is left of the sum
    assert (np.linalg.norm(difference, axis=-1) <= allowed * np.linalg.norm(added, axis=-1).mean()).all()
    np.testing.assert_allclose(actual[:, 0], expected[:, 0], rtol=2**-7)
    np.testing.assert_allclose(stream.moments_TN2, moments(stream.x_TD), rtol=1e-4, atol=1e-3)
    for old, new, added in ((given.k_TNSH, k_TNSH, k_TNH), (given.v_TNSH, v_TNSH, v_TNH)):
        old, new = (np.asarray(each.astype(jnp.float32)) for each in (old, new))
        for row, position in enumerate(np.asarray(given.positions_T)):
            if position >= 0:
                np.testing.assert_allclose(new[row, :, position], added[row], rtol=2**-6, atol=2**-8)
            rest = np.arange(old.shape[2]) != position
            np.testing.assert_array_equal(new[row][:, rest], old[row][:, rest])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", thinned([(4, 4, 16), (2, 1, 8), (3, 8, 300)], (3, 8, 300)), ids=str)
def test_the_reference_agrees_with_numpy(shape, dtype):
    given = block_numpy.operands(*shape, dtype)
    operands = _in_pages(given)
    result = jax.jit(partial(run, implementation="xla"))(*operands)
    _check(given, _together(given, operands, result), dtype, 1e-5 if dtype == jnp.float32 else 2e-2)


def _taken(
    *,
    rows: int = 1,
    tokens: int = 1,
    heads: int = 12,
    kv_heads: int = 12,
    head_width: int = 64,
    width: int = 768,
    mlp_width: int = 3072,
    dtype: Any = jnp.bfloat16,
    cache_dtype: Any = None,
    packed: bool = False,
    activation: str = "gelu_tanh",
    implementation: str = "mosaic",
) -> bool:
    def shaped(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def linear(inputs: int, outputs: int) -> package.LinearWeights:
        return package.LinearWeights(shaped(inputs, outputs), shaped(outputs))

    D, F = width, mlp_width
    norm, qkv = package.NormWeights(shaped(D), shaped(D)), linear(D, (heads + 2 * kv_heads) * head_width)
    up = linear(D, F)
    if packed:
        blocks, scales = (jax.ShapeDtypeStruct(shape, jnp.uint8) for shape in ((F, D // 32, 16), (F, D // 32)))
        up = up._replace(kernel=MXFP4(blocks, scales))
    weights = package.Weights(norm, qkv, linear(heads * head_width, D), norm, up, linear(F, D))
    cache = jax.ShapeDtypeStruct((1 + 8 * rows, kv_heads, 128, head_width), cache_dtype or dtype)
    return package.takes(
        shaped(rows, tokens, D), weights, cache, cache, activation=activation, implementation=implementation
    )


def test_only_what_is_gpt2_in_bfloat16_is_taken():
    assert _taken() == _taken(rows=8) == (jax.__version_info__ >= (0, 11))
    for other in (
        {"rows": 9},
        {"tokens": 2},
        {"dtype": jnp.float32},
        {"cache_dtype": jnp.float32},
        {"kv_heads": 4},
        {"head_width": 32, "heads": 24, "kv_heads": 24},
        {"mlp_width": 3000},
        {"packed": True},
        {"activation": "gelu_erf"},
        {"implementation": "xla"},
        {"heads": 64, "kv_heads": 64, "width": 4096, "mlp_width": 16384},
    ):
        assert not _taken(**other), other


def test_what_does_not_fit_on_the_device_at_once_is_not_taken(monkeypatch):
    # All clusters wait for each other: too few multiprocessors would wait for ever.
    for count in (0, 16, 60, 78, 114, 132, 144):
        monkeypatch.setattr(api, "multiprocessors", lambda count=count: count)
        for panels in range(1, 33):
            blocks = api.cluster(panels)
            if blocks is None:
                continue
            assert 4 <= blocks <= 8
            # Whatever groups of at least eight they lie in, whole clusters fit.
            groups = [count // 8 + (group < count % 8) for group in range(8)]
            assert sum(group // blocks for group in groups) >= panels
    monkeypatch.setattr(api, "multiprocessors", lambda: 132)
    assert [api.cluster(panels) for panels in (12, 16, 20, 25)] == [6, 4, 5, 4]


def test_a_stream_for_other_sizes_is_refused():
    given = block_numpy.operands(2, 1, 8, jnp.float32)
    stream = given.stream.of(given.stream.x_TD, 64)
    with pytest.raises(ValueError, match="a workspace of 388 words is needed"):
        run(stream, *_in_pages(given)[1:])


def test_a_name_without_a_kernel_is_refused():
    given = block_numpy.operands(2, 1, 8, jnp.float32)
    with pytest.raises(ValueError, match="block has no implementation 'mosaic' for these operands; it has xla"):
        run(*_in_pages(given), implementation="mosaic")


@needs_mosaic
def test_more_pages_than_a_warp_holds_are_refused():
    *rest, _ = _in_pages(block_numpy.operands(2, 1, 8, jnp.bfloat16))
    kernel = partial(run, implementation="mosaic")
    assert jax.eval_shape(kernel, *rest, jnp.zeros((1, 32), jnp.int32))
    with pytest.raises(ValueError, match="block has no implementation 'mosaic' for these operands; it has xla"):
        jax.eval_shape(kernel, *rest, jnp.zeros((1, 33), jnp.int32))


@needs_mosaic
@pytest.mark.parametrize("shape", thinned(SHAPES, SHAPES[0], SHAPES[-2]), ids=str)
def test_the_kernel_lowers_for_cuda(shape):
    N, T, S = shape
    given, Z = block_numpy.operands(N, T, 8, jnp.bfloat16), -(-S // 128)
    pool = jax.ShapeDtypeStruct((1 + Z * T, N, 128, 64), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((T, Z), jnp.int32)
    text = lowered(partial(run, implementation="mosaic"), *given[:3], pool, pool, table)
    assert text.count("custom_call @mosaic_gpu") == 1 and "output_operand_aliases" in text


@needs_mosaic
def test_shared_memory_is_enough():
    from pallas_kernels.block.plan_sm90 import TOGETHER, BlockPlan

    for panels in range(1, 33):
        for rows in range(1, api.MOST_ROWS + 1):
            if (blocks := api.cluster(panels)) is None:
                continue
            plan = BlockPlan(rows=rows, panels=panels, blocks=blocks, pages=8, scale=SCALE, epsilon=EPSILON)
            sizes = [np.prod(each.shape) * np.dtype(each.dtype).itemsize for each in plan.shared().values()]
            # Mosaic gives each a multiple of 1 KiB; a block has a multiprocessor to itself, with 227 KiB.
            assert sum(-(-size // 1024) for size in sizes) <= 226
            assert plan.stages >= TOGETHER


@needs_mosaic
@pytest.mark.parametrize(("batch", "taken"), [(1, True), thorough(8, True), (9, False)])
@pytest.mark.parametrize("implementation", ["auto", "mosaic"])
def test_a_model_decodes_by_it(batch, taken, implementation, monkeypatch):
    monkeypatch.setattr(dispatch, "preferred", lambda: dispatch.MOSAIC if implementation == "auto" else dispatch.XLA)
    config = dataclasses.replace(PUBLISHED["gpt2"], num_layers=2, vocab_size=64)
    model = registry.build(config, dtype=jnp.bfloat16, implementation=implementation)
    params = random_params(model)
    state = steps.init_state(model, batch=batch, max_length=64)
    operands = params, state, np.zeros(batch, np.int32)
    text = steps.advance.trace(model, *operands).lower(lowering_platforms=("cuda",)).as_text()
    assert ("gpt2_block" in text) == taken
    assert ("decode_attention" in text) != taken


@needs_hopper
@pytest.mark.parametrize("shape", [*SHAPES, (12, 8, 300), (25, 1, 257), (12, 1, 128)], ids=str)
def test_the_kernel_agrees_with_numpy(shape):
    """And its bits do not depend on where pages lie."""
    given = block_numpy.operands(*shape, jnp.bfloat16)
    kernel = jax.jit(partial(run, implementation="mosaic"))
    results = []
    for seed in range(2):
        operands = _in_pages(given, seed)
        stream, k_YNSH, v_YNSH = kernel(*operands)
        results.append(_together(given, operands, (stream, k_YNSH, v_YNSH)))
        _check(given, results[-1], jnp.bfloat16, 2e-2)
    for one, two in zip(*results, strict=True):
        one, two = (np.asarray(getattr(each, "x_TD", each).astype(jnp.float32)) for each in (one, two))
        np.testing.assert_array_equal(two, one)
    # What clusters tell each other: the next block finds it as this one did.
    assert (np.asarray(stream.cleared_W) == 0xFFFFFFFF).all()
    _, weights, positions_T, *_, table_TZ = operands
    operands = stream, weights, positions_T, k_YNSH, v_YNSH, table_TZ
    following = _together(given, operands, kernel(*operands))
    _check(given._replace(stream=stream), following, jnp.bfloat16, 2e-2)


@needs_hopper
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0])
def test_rows_do_not_depend_on_each_other(value):
    given = block_numpy.operands(12, 8, 256, jnp.bfloat16)
    kernel = jax.jit(partial(run, implementation="mosaic"))
    operands = _in_pages(given)
    stream, *cache = _together(given, operands, kernel(*operands))
    operands = given.stream.of(given.stream.x_TD.at[3].set(value), 3072), *operands[1:]
    changed, *other_cache = _together(given, operands, kernel(*operands))
    for old, new in zip((stream.x_TD, *cache), (changed.x_TD, *other_cache), strict=True):
        old, new = (np.delete(np.asarray(each.astype(jnp.float32)), 3, axis=0) for each in (old, new))
        np.testing.assert_array_equal(new, old)


def test_a_streams_moments_do_not_depend_on_the_number_of_rows():
    x_TD = block_numpy.operands(2, 8, 8, jnp.bfloat16).stream.x_TD
    of_all = np.asarray(jax.jit(moments)(x_TD))
    x_TNH = np.asarray(x_TD.astype(jnp.float32), np.float64).reshape(8, 2, 64)
    np.testing.assert_allclose(of_all, np.stack((x_TNH.mean(axis=-1), 64 * x_TNH.var(axis=-1)), axis=-1), rtol=1e-5)
    for count in (1, 2, 4):
        np.testing.assert_array_equal(jax.jit(moments)(x_TD[:count]), of_all[:count])


@needs_hopper
@pytest.mark.parametrize("heads", [12, 16, 20, 25])
def test_bits_do_not_depend_on_the_number_of_rows(heads):
    given = block_numpy.operands(heads, 8, 1024, jnp.bfloat16)
    _, weights, _, k_YNSH, v_YNSH, table_TZ = _in_pages(given)
    kernel = jax.jit(partial(run, implementation="mosaic"))

    def computed(rows: list[int]) -> list[np.ndarray]:
        """By row: the stream, its moments, and the new token's key and value."""
        of_rows = np.asarray(rows)
        stream = package.Stream.of(given.stream.x_TD[of_rows], 256 * heads)
        positions_T, table = given.positions_T[of_rows], table_TZ[of_rows]
        out, *pools = kernel(stream, weights, positions_T, k_YNSH, v_YNSH, table)
        places = np.maximum(np.asarray(positions_T), 0)
        pages = np.asarray(table)[np.arange(len(rows)), places // 128]
        new = [np.asarray(pool)[pages, :, places % 128] for pool in pools]
        return [np.asarray(out.x_TD), np.asarray(out.moments_TN2), *new]

    alone = [computed([row]) for row in range(8)]
    for rows in ([0, 1], [7, 6, 5], [2, 0, 4, 1], [3, 1, 0, 6, 5], [*range(8)]):
        for number, found in enumerate(computed(rows)):
            for place, row in enumerate(rows):
                assert found[place].tobytes() == alone[row][number][0].tobytes(), f"result {number} of {row} in {rows}"


@needs_hopper
@pytest.mark.parametrize("batch", [1, 8])
def test_a_model_agrees_with_xla(batch):
    config = dataclasses.replace(PUBLISHED["gpt2"], num_layers=4, vocab_size=512)
    tokens = np.random.default_rng(0).integers(0, 512, (8, batch)).astype(np.int32)
    logits = []
    for implementation in ("auto", "xla"):
        model = registry.build(config, dtype=jnp.bfloat16, implementation=implementation)
        params, state = random_params(model), steps.init_state(model, batch=batch, max_length=64)
        for token_B in tokens:
            state = steps.advance(model, params, state, token_B)
        logits.append(np.asarray(state.logits_BV))
    assert np.linalg.norm(logits[0] - logits[1]) <= 3e-2 * np.linalg.norm(logits[1])
