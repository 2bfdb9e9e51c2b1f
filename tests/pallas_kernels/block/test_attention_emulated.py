"""Attention in GPT-2's block, emulated on a CPU: against float64, and a row's bits among any number of rows.

The emulator shows who computes what and in which order; what ptxas makes of it, only a GPU does (see `test_block.py`).
"""

import importlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import ptx
from pallas_kernels.ptx import Value
from tests.oracles.paged import PAGE, paged
from tests.pallas_kernels.emulated_ptx import launched
from tests.pallas_kernels.marks import needs_mosaic
from tests.thinned import thinned, thorough

pytestmark = needs_mosaic
HEADS, SCALE, H = 2, 0.125, 64
_MODULES = ["attention_sm90", "products_sm90", "workspace_sm90"]


class Rows(NamedTuple):
    """What some rows are given."""

    sums_RITH: np.ndarray  # each block's share of queries, keys and values; I = 3 · heads, of one head after the other
    positions_T: np.ndarray
    k_YNSH: np.ndarray
    v_YNSH: np.ndarray
    table_TZ: np.ndarray
    expected_TNH: np.ndarray

    def of(self, *rows: int) -> "Rows":
        """Some of them, in this order."""
        rows_ = list(rows)
        return self._replace(
            sums_RITH=self.sums_RITH[:, :, rows_],
            positions_T=self.positions_T[rows_],
            table_TZ=self.table_TZ[rows_],
            expected_TNH=self.expected_TNH[rows_],
        )


def _rows(positions: list[int], blocks: int, pages: int) -> Rows:
    rng, T = np.random.default_rng(sum(positions)), len(positions)
    sums = rng.standard_normal((blocks, 3 * HEADS, T, H), np.float32) * np.float32(2 / np.sqrt(blocks))
    # The keys and values of new tokens are not in the pages yet: their places hold NaN.
    given = paged([(0, max(0, each)) for each in positions], K=HEADS, H=H, dtype=jnp.bfloat16, pages=pages)
    total = sums.astype(np.float64).sum(axis=0).astype(ml_dtypes.bfloat16).astype(np.float64)
    q, k, v = total.reshape(HEADS, 3, T, H).swapaxes(0, 1)
    expected = np.zeros((T, HEADS, H))
    for row, position in enumerate(positions):
        if position < 0:
            continue
        keys, values = (
            np.concatenate((cache[row, :, :position].astype(np.float64), new[:, row, None]), axis=1)
            for cache, new in ((given.k_BKSH, k), (given.v_BKSH, v))
        )
        scores = np.einsum("nh,nsh->ns", q[:, row], keys) * SCALE
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        expected[row] = np.einsum("ns,nsh->nh", weights / weights.sum(axis=-1, keepdims=True), values)
    return Rows(sums, np.array(positions, np.int32), given.k_YKSH, given.v_YKSH, given.table_BZ, expected)


def _emulated(rows: Rows) -> np.ndarray:
    """What the heads of all rows are, [T, N, H] bfloat16."""
    from pallas_kernels.block import products_sm90
    from pallas_kernels.block.attention_sm90 import Head
    from pallas_kernels.block.plan_sm90 import QKV, BlockPlan
    from pallas_kernels.block.stream import PANEL

    T, Z = rows.table_TZ.shape
    blocks = len(rows.sums_RITH)
    plan = BlockPlan(rows=T, panels=HEADS, blocks=blocks, pages=Z, scale=SCALE, epsilon=0.0)
    shared = {name: each for name, each in plan.shared().items() if name not in ("ring", "filled")}

    def attention(*, panel: Value, **at: Value) -> None:
        thread = products_sm90.Thread.of(plan, panel, {name: at[name] for name in shared})
        thread.cluster.prepare([QKV * plan.mailbox, blocks * T * (PANEL + 2)])
        head = Head.of(thread, at)
        first = head.load_first()
        thread.cluster.wait_prepared()
        _, g, q = ptx.fragment_lane()
        column = ptx.add(ptx.mul(thread.cluster.warp, 8), g)
        for part in range(QKV):
            of_part = ptx.add(ptx.mul(thread.rank, QKV * HEADS), ptx.mul(panel, QKV), part)
            sums = []
            for i in range(2):
                row = ptx.add(ptx.mul(q, 2), i)
                place = ptx.add(ptx.mul(ptx.add(ptx.mul(of_part, T), row), H), column)
                sums += ptx.load(ptx.offset(at["sums_of_blocks"], place, 4), [ptx.f32()], ptx.less(row, T))
            products_sm90.send_sums(thread, 0, sums, part, range(blocks))
        head.sum_up(first, 0)
        head.attend(first, 1)
        products_sm90.block_does(thread, 1, partial(head.finish, 1, at["heads"]))

    modules = [importlib.import_module(f"pallas_kernels.block.{name}") for name in _MODULES]
    results = launched(*modules)(
        attention,
        {
            "sums_of_blocks": rows.sums_RITH,
            "qkv.bias": np.zeros(3 * HEADS * H, ml_dtypes.bfloat16),
            "positions": rows.positions_T,
            "table": rows.table_TZ.astype(np.int32),
            "k": rows.k_YNSH,
            "v": rows.v_YNSH,
        },
        {"heads": jax.ShapeDtypeStruct((T, HEADS, H), jnp.bfloat16)},
        {"panel": HEADS},
        shared,
        cluster=blocks,
        warpgroups=2,
    )
    return results["heads"]


def _check(rows: Rows, heads_TNH: np.ndarray) -> None:
    # Half a last place of bfloat16; and queries, keys and values are rounded sums, which may lie near a tie.
    np.testing.assert_allclose(heads_TNH.astype(np.float64), rows.expected_TNH, rtol=2**-8, atol=2**-8)


def _same(actual: np.ndarray, expected: np.ndarray, what: Any) -> None:
    np.testing.assert_array_equal(actual.view(np.uint16), expected.view(np.uint16), err_msg=str(what))


@pytest.mark.parametrize("blocks", thinned([4, 5, 6, 8], 4, 6))
def test_bits_do_not_depend_on_the_number_of_rows(blocks):
    """Of few positions, of more than a turn of all warps has, and of none."""
    positions = [700, 300, 1, 0, -1, 15, 129, 1023]
    rows = _rows(positions, blocks, pages=8)
    alone = np.concatenate([_emulated(rows.of(row)) for row in range(len(positions))])
    _check(rows, alone)
    for order in ([0, 1], [7, 2, 0], [4, 0, 5, 6], [1, 3, 2, 5, 0], [6, 7, 5, 1, 2, 0, 3], [*range(8)]):
        _same(_emulated(rows.of(*order)), alone[order], order)


@pytest.mark.parametrize("position", [15, 16, 17, 127, 128, 511, thorough(512), thorough(513), 767, 768, thorough(769)])
def test_bits_do_not_depend_on_the_number_of_rows_at_the_ends_of_units_and_turns(position):
    rows = _rows([position], 4, pages=8)
    alone = _emulated(rows)
    _check(rows, alone)
    for count in (2, 4, 8):
        _same(_emulated(rows.of(*[0] * count)), np.repeat(alone, count, axis=0), count)


def test_bits_do_not_depend_on_the_width_of_the_table():
    rows = _rows([100, 127], 4, pages=1)
    narrow = _emulated(rows)
    _check(rows, narrow)
    for more in (3, 7, 31):
        _same(_emulated(rows._replace(table_TZ=np.pad(rows.table_TZ, ((0, 0), (0, more))))), narrow, more)


def test_what_a_row_has_no_pages_for_is_not_read():
    """A position beyond the row's pages: its query sees what is there, and the new token."""
    rows = _rows([PAGE], 4, pages=1)
    beyond = rows._replace(positions_T=np.array([5000], np.int32))
    _same(_emulated(beyond), _emulated(rows), "beyond")
