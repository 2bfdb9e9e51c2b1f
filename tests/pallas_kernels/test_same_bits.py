"""A row's bits on a CPU do not depend on the number of rows: compared with chains of fused multiply-adds in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import same_bits
from pallas_kernels.attention import paged
from pallas_kernels.formats.mxfp4 import quantize
from pallas_kernels.logits import summary
from pallas_kernels.moe import moe
from pallas_kernels.pages import PAGE, Tiles
from tests.thinned import thorough

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the rule is for CPUs")

chained = pytest.mark.skipif(not same_bits.holds(), reason="products on this CPU were not looked at")

ROWS = (1, 2, 3, 8, 9, 31, 64, 65, 512)


def rounded_sum(product: np.ndarray, total: np.ndarray) -> np.ndarray:
    """product + total, both float64 or wider and exact, rounded once to float32."""
    return (product.astype(np.longdouble) + total.astype(np.longdouble)).astype(np.float32)


def chains(x_I: np.ndarray, kernel_IO: np.ndarray, run: int = same_bits.RUN) -> np.ndarray:
    """x · kernel by fused multiply-adds in ascending order, in equal runs of at most `run`, added in order."""
    count = -(-len(x_I) // run)
    while len(x_I) % count:
        count += 1
    totals = []
    for x_R, kernel_RO in zip(np.split(x_I, count), np.split(kernel_IO, count), strict=True):
        total_O = np.zeros(kernel_IO.shape[1], np.float32)
        for x, kernel_O in zip(x_R, kernel_RO, strict=True):
            total_O = rounded_sum(x.astype(np.float64) * kernel_O.astype(np.float64), total_O)
        totals.append(total_O)
    result = totals[0]
    for total_O in totals[1:]:
        result = result + total_O
    return result


def operands(inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(inputs * outputs)
    x_TI, kernel_IO = rng.standard_normal((max(ROWS), inputs)), rng.standard_normal((inputs, outputs))
    return x_TI.astype(np.float32), kernel_IO.astype(np.float32)


@chained
@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [(96, 33), (1152, 48), *(thorough(*each) for each in ((48, 8), (64, 40), (256, 96), (1024, 72), (768, 320)))],
)
def test_products_are_chains(inputs: int, outputs: int) -> None:
    x_TI, kernel_IO = operands(inputs, outputs)
    of_rows = jnp.asarray(np.ascontiguousarray(kernel_IO.T))
    expected_O = chains(x_TI[-1], kernel_IO)
    for rows in ROWS:
        some = jnp.asarray(x_TI[-rows:])  # the row that is compared is the last
        for product, kernel in ((same_bits.product, kernel_IO), (same_bits.product_of_rows_on_cpu, of_rows)):
            found_TO = np.asarray(jax.jit(product)(some, kernel))
            np.testing.assert_array_equal(found_TO[-1], expected_O, err_msg=f"{product.__name__}, {rows} rows")


@chained
@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        (40, 7),
        (2880, 101),
        *(thorough(*each) for each in ((96, 101), (256, 3001), (192, 999), (768, 2003), (1600, 203))),
    ],
)
def test_a_head_is_the_same_up_to_128_rows(inputs: int, outputs: int) -> None:
    x_TI, kernel_IO = operands(inputs, outputs)
    kernel_OI = jnp.asarray(np.ascontiguousarray(kernel_IO.T))
    head = jax.jit(same_bits.head, compiler_options=same_bits.COMPILER)
    found = [np.asarray(head(jnp.asarray(x_TI[-rows:]), kernel_OI))[-1] for rows in (1, 2, 3, 8, 31, 64, 128)]
    np.testing.assert_allclose(found[0], x_TI[-1].astype(np.float64) @ kernel_IO.astype(np.float64), atol=1e-4)
    for each in found[1:]:
        np.testing.assert_array_equal(each, found[0])


@pytest.mark.parametrize("D", [32, 96, 256, 768, 2880])
def test_means_of_rows(D: int) -> None:
    x_TD = operands(D, 1)[0]

    @jax.jit
    def means(x_TD: jax.Array) -> jax.Array:
        return same_bits.mean(jnp.square(x_TD))[:, 0]

    found = [np.asarray(means(jnp.asarray(x_TD[-rows:])))[-1] for rows in ROWS]
    np.testing.assert_allclose(found[0], np.square(x_TD[-1].astype(np.float64)).mean(), rtol=1e-5)
    assert len(set(found)) == 1


@pytest.mark.parametrize("choices", [4, 8])
def test_softmax_over_choices(choices: int) -> None:
    x_TX = operands(choices, 1)[0]
    softmax = jax.jit(same_bits.softmax, compiler_options=same_bits.COMPILER)
    found_TX = np.asarray(softmax(jnp.asarray(x_TX)))
    expected_TX = np.exp(x_TX.astype(np.float64))
    np.testing.assert_allclose(found_TX, expected_TX / expected_TX.sum(axis=1, keepdims=True), rtol=1e-6)
    for rows in (1, 3, 8, 31, 64, 257):
        for first in (0, 5, 200):
            some_TX = softmax(jnp.asarray(x_TX[first : first + rows]))
            np.testing.assert_array_equal(some_TX, found_TX[first : first + rows])


def _log_probabilities(x_TX: jax.Array) -> jax.Array:
    found = summary(x_TX, implementation="xla")
    return x_TX - found.largest_B[:, None] - same_bits.log(found.total_B)[:, None]


def test_log_probabilities() -> None:
    """Of 480 rows, as of the logarithms of 3 numbers a few in a hundred differ from those of one."""
    x_TX = operands(5000, 1)[0][:480]
    run = jax.jit(_log_probabilities, compiler_options=same_bits.COMPILER)
    alone_TX = np.concatenate([run(jnp.asarray(x_1X)) for x_1X in np.split(x_TX, 480)])
    double_TX = x_TX.astype(np.float64)
    np.testing.assert_allclose(alone_TX, double_TX - np.log(np.exp(double_TX).sum(1, keepdims=True)), atol=1e-5)
    for rows in (3, 5, 6, 8, 15, 32):
        together = [run(jnp.asarray(some_TX)) for some_TX in np.split(x_TX, 480 // rows)]
        np.testing.assert_array_equal(np.concatenate(together), alone_TX, err_msg=f"{rows} rows")


@chained
@pytest.mark.parametrize(
    ("D", "F", "packed"), [(96, 64, True), thorough(640, 544, False), thorough(96, 64, False), thorough(640, 544, True)]
)
def test_a_token_among_few_or_many_of_its_experts(D: int, F: int, packed: bool) -> None:
    """Its bits depend neither on how many tokens there are nor on how many of them go to its experts."""
    E, X, most = 6, 2, 300
    rng = np.random.default_rng(D + F)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape).astype(np.float32))

    kernels = [quantize(normal(E, 2 * F, D) * D**-0.5), quantize(normal(E, D, F) * F**-0.5)]
    gate_up, down = kernels if packed else [each.dequantize().swapaxes(1, 2) for each in kernels]
    gate_up_bias, down_bias, x_TD, weights_TX = normal(E, 2 * F), normal(E, D), normal(most, D), normal(most, X)

    @partial(jax.jit, compiler_options=same_bits.COMPILER)
    def run(x_TD: jax.Array, experts_TX: jax.Array, weights_TX: jax.Array) -> jax.Array:
        operands = x_TD, experts_TX, weights_TX, gate_up, gate_up_bias, down, down_bias
        return moe(*operands, alpha=1.702, limit=7.0).total()

    own = np.array([[4, 1], [0, 5], [1, 2]], np.int32)  # of the last tokens, which are compared
    ends = [(-3, -2), (-2, -1), (-1, None)]
    alone = [run(x_TD[s:e], jnp.asarray(own[s:e]), weights_TX[s:e]) for s, e in ends]
    for T in (3, 9, 40, most):
        for others in ([4, 1], [3, 0], [-1, -1], None):
            experts_TX = rng.permuted(np.tile(np.arange(E), (T, 1)), axis=1)[:, :X] if others is None else [others] * T
            experts_TX = jnp.asarray(experts_TX, jnp.int32).at[-3:].set(own)
            found_TD = run(x_TD[-T:], experts_TX, weights_TX[-T:])
            np.testing.assert_array_equal(found_TD[-3:], jnp.concatenate(alone), err_msg=f"{T} tokens, {others}")


def test_reciprocal_roots() -> None:
    x_T = np.random.default_rng(0).uniform(0.1, 10, 100).astype(np.float32)
    rsqrt = jax.jit(same_bits.rsqrt, compiler_options=same_bits.COMPILER)
    for count in (1, 15, 16, 17, 100):
        np.testing.assert_array_equal(rsqrt(jnp.asarray(x_T[:count])), 1 / np.sqrt(x_T[:count]))


def test_what_is_rounded_stays_rounded() -> None:
    x_T = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    x_T[:4] = np.nan, np.inf, 1e-40, 3.4e38
    back_and_forth = jax.jit(lambda x_T: same_bits.rounded(x_T, jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(back_and_forth(x_T), x_T.astype(jnp.bfloat16).astype(np.float32))
    assert "reduce_precision" in back_and_forth.lower(x_T).as_text()  # which no compiler may leave out
    half = same_bits.rounded(jnp.full(1, 1e-6), jnp.float16)
    np.testing.assert_array_equal(half, np.full(1, 1e-6, np.float16))


@chained
@pytest.mark.parametrize("H", [16, 64])
def test_attention_of_few_and_of_many_queries(H: int) -> None:
    """A query's bits do not depend on how many of its prompt are in the call."""
    rng = np.random.default_rng(H)
    q_TNH = rng.standard_normal((200, 4, H)).astype(np.float32)
    k_YKSH, v_YKSH = (jnp.asarray(rng.standard_normal((3, 2, PAGE, H)).astype(np.float32)) for _ in range(2))
    table_1Z = jnp.asarray([[2, 1]], jnp.int32)

    @partial(jax.jit, compiler_options=same_bits.COMPILER)
    def attended(q_TNH: jax.Array) -> jax.Array:
        tiles = Tiles.of(jnp.arange(len(q_TNH), dtype=jnp.int32)[None])
        return paged.packed(q_TNH, k_YKSH, v_YKSH, table_1Z, tiles, scale=H**-0.5)

    all_TNH = np.asarray(attended(jnp.asarray(q_TNH)))
    for T in (16, 22, 32, 64, 75, 128):
        np.testing.assert_array_equal(attended(jnp.asarray(q_TNH[:T])), all_TNH[:T], err_msg=f"{T} queries")
