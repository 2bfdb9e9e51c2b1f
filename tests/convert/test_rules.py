"""The executor of tables: what it finds wrong before data is read, and that it says all of it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert import filling, matching
from convert.rules import TRANSPOSED, Copy, Ignored, Rule, Table, Transform
from gptjax.checkpoints.safetensors import open_directory
from gptjax.errors import CheckpointError
from tests.convert import made

TABLE = Table(
    rules=(
        Rule("[model.]top", "top"),
        Rule("[model.]layers.{N}.up", "block_{N}/up"),
        Rule("[model.]layers.{N}.down", "block_{N}/down", if_missing="or do without"),
    ),
    ignored=(Ignored("[model.]layers.{N}.mask", "a buffer"),),
    copies=(Copy("head", "[model.]top", otherwise="untie it"),),
)
SHAPES = {"top": (7, 3), "layers.0.up": (3, 5), "layers.0.down": (5, 3), "layers.1.up": (3, 5), "layers.1.down": (5, 3)}


def _targets():
    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return {"top": leaf(7, 3), **{f"block_{i}": {"up": leaf(3, 5), "down": leaf(5, 3)} for i in range(2)}}


def _tensors(**changes):
    """Sound tensors; a change to None removes one."""
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}
    return {name: array for name, array in (tensors | changes).items() if array is not None}


def _source(tmp_path, tensors):
    made.write(tmp_path / "model.safetensors", tensors)
    return open_directory(tmp_path)


def _stream(plan, source):
    return ((path, read()) for path, read in filling.readers(plan, source))


def _refused(tmp_path, tensors, *parts, table=TABLE, targets=None):
    source = _source(tmp_path, tensors)
    source.read = None  # type: ignore[method-assign, assignment]  # checking touches no data
    with pytest.raises(CheckpointError) as caught:
        matching.check(table, source.tensors, targets or _targets())
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_fills_every_target(tmp_path, prefix):
    tensors = _tensors(**{"layers.0.mask": np.zeros((1, 1), np.int32)})
    source = _source(tmp_path, {prefix + name: array for name, array in tensors.items()})
    found = {
        "/".join(path): array for path, array in _stream(matching.check(TABLE, source.tensors, _targets()), source)
    }
    expected = {
        "top": "top",
        **{f"block_{i}/{part}": f"layers.{i}.{part}" for i in range(2) for part in ("up", "down")},
    }
    assert found.keys() == expected.keys()
    for path, name in expected.items():
        assert made.same_bits(found[path], tensors[name])
        assert not found[path].flags.owndata  # a view of the file


def test_streams_in_the_order_of_the_file(tmp_path):
    names = ["layers.1.down", "top", "layers.0.up", "layers.1.up", "layers.0.down"]
    tensors = _tensors()
    source = _source(tmp_path, {name: tensors[name] for name in names})
    paths = [path for path, _ in _stream(matching.check(TABLE, source.tensors, _targets()), source)]
    assert paths == [("block_1", "down"), ("top",), ("block_0", "up"), ("block_1", "up"), ("block_0", "down")]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_floating_dtypes_stay_as_they_are(tmp_path, dtype):
    tensors = _tensors()
    tensors["layers.0.up"] = tensors["layers.0.up"].astype(dtype)
    source = _source(tmp_path, tensors)
    found = dict(_stream(matching.check(TABLE, source.tensors, _targets()), source))
    assert found["block_0", "up"].dtype == np.dtype(dtype)
    assert found["top",].dtype == np.float32


def test_all_faults_together(tmp_path):
    tensors = _tensors(
        **{
            "layers.0.up": np.zeros((5, 3), np.float32),
            "layers.0.down": None,
            "layers.1.up": np.zeros((3, 5), np.int32),
            "layers.1.down": np.zeros((5, 3), ml_dtypes.float8_e4m3fn),
            "layers.2.up": np.zeros((3, 5), np.float32),
            "model.top": np.zeros((7, 3), np.float32),
            "strange": np.zeros(1, np.float32),
        }
    )
    message = _refused(tmp_path, tensors, "correct config.json or download the checkpoint again")
    for part in (
        "layers.0.down; or do without",
        "layers.2.up (the model has no block_2/up)",
        "strange",
        "layers.0.up is [5, 3], expected [3, 5]",
        "layers.1.down is F8_E4M3, expected F32 or F16 or BF16",
        "layers.1.up is I32, expected F32 or F16 or BF16",
        "top: top, model.top",
        "model.top has a prefix, ",
    ):
        assert part in message
    assert [line.strip() for line in message.splitlines() if line.endswith(":")] == [
        "1 tensor missing:",
        "2 tensors unknown:",
        "1 tensor filling the same weight:",
        "1 tensor of the wrong shape:",
        "2 tensors of the wrong dtype:",
        "1 tensor with inconsistent prefixes:",
    ]


@pytest.mark.parametrize("name", list(SHAPES))
def test_each_tensor_is_needed(tmp_path, name):
    _refused(tmp_path, _tensors(**{name: None}), f"1 tensor missing:\n    {name}")


def test_missing_tensors_are_named_with_the_prefix_of_the_others(tmp_path):
    tensors = {f"model.{name}": array for name, array in _tensors(top=None).items()}
    _refused(tmp_path, tensors, "1 tensor missing:\n    model.top")


def test_a_part_of_the_names_with_prefix_is_a_fault(tmp_path):
    tensors = _tensors(top=None, **{"model.top": np.zeros((7, 3), np.float32)})
    _refused(tmp_path, tensors, "1 tensor with inconsistent prefixes", "model.top has a prefix, layers.0.up has none")


@pytest.mark.parametrize(
    "name",
    ["layers.00.up", "layers.-1.up", "layers.\u0661.up", "layers..up", "xlayers.0.up", "layers.0.up.x", "layersx0.up"],
)
def test_patterns_match_whole_names_and_plain_numbers(tmp_path, name):
    message = _refused(tmp_path, _tensors(**{"layers.0.up": None, name: np.zeros((3, 5), np.float32)}))
    assert "1 tensor missing" in message and "1 tensor unknown" in message


def test_a_target_that_no_rule_fills_is_told(tmp_path):
    targets = _targets() | {"new": jax.ShapeDtypeStruct((2,), jnp.float32)}
    _refused(tmp_path, _tensors(), "no rule fills new", targets=targets)


def test_a_source_may_fill_several_targets_transformed(tmp_path):
    halves = [Transform(f"half {i}", lambda s: ((2 * s[0], s[1]),), lambda a, i=i: np.split(a, 2)[i]) for i in range(2)]
    table = Table((Rule("both", "a", halves[0]), Rule("both", "b", halves[1]), Rule("turned", "c", TRANSPOSED)))
    targets = {name: jax.ShapeDtypeStruct((2, 3), jnp.float32) for name in "abc"}
    both, other = np.arange(12, dtype=np.float32).reshape(4, 3), np.arange(6, dtype=np.float32).reshape(3, 2)
    source = _source(tmp_path, {"both": both, "turned": other})
    found = dict(_stream(matching.check(table, source.tensors, targets), source))
    assert np.array_equal(found["a",], both[:2]) and np.array_equal(found["b",], both[2:])
    assert np.array_equal(found["c",], other.T)
    _refused(
        tmp_path, {"both": both, "turned": other.T}, "turned is [2, 3], expected [3, 2]", table=table, targets=targets
    )


def test_long_lists_are_cut(tmp_path):
    extra = {f"strange{i:02}": np.zeros(1, np.float32) for i in range(45)}
    message = _refused(tmp_path, _tensors(**extra), "45 tensors unknown", "and 25 more")
    assert "strange19" in message and "strange20" not in message


def test_names_are_printed_harmlessly(tmp_path):
    message = _refused(tmp_path, _tensors(**{"\x1b[2Jx": np.zeros(1, np.float32), "y" * 9000: np.zeros(1, np.float32)}))
    assert "\x1b" not in message and "\\x1b[2Jx" in message
    assert len(message) < 2000


def test_a_copy_must_be_equal_bit_for_bit(tmp_path):
    tensors = _tensors()
    tensors["top"][0, 0] = 0.0
    equal, negative = tensors["top"].copy(), tensors["top"].copy()
    negative[0, 0] = -0.0  # equal as a number, but not the same bits
    source = _source(tmp_path, tensors | {"head": equal})
    assert len(list(_stream(matching.check(TABLE, source.tensors, _targets()), source))) == 5
    source = _source(tmp_path, tensors | {"head": negative})
    with pytest.raises(CheckpointError, match="head differs from top; untie it"):
        next(_stream(matching.check(TABLE, source.tensors, _targets()), source))


def test_a_copy_that_differs_in_a_later_piece_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(filling, "_PIECE", 4)
    tensors = _tensors()
    head = tensors["top"].copy()
    head[-1, -1] += 1
    source = _source(tmp_path, tensors | {"head": head})
    with pytest.raises(CheckpointError, match="head differs"):
        next(_stream(matching.check(TABLE, source.tensors, _targets()), source))


@pytest.mark.parametrize(
    ("head", "kind", "said"),
    [
        (np.zeros((3, 7), np.float32), "of the wrong shape", "head is [3, 7], but top is [7, 3]; untie it"),
        (np.zeros((7, 3), np.int32), "of the wrong dtype", "head is I32, expected F32 or F16 or BF16"),
    ],
)
def test_a_copy_of_another_shape_or_kind_is_seen_in_the_headers(tmp_path, head, kind, said):
    _refused(tmp_path, _tensors(head=head), f"1 tensor {kind}", said)


@pytest.mark.parametrize("top", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("head", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_copy_of_another_dtype_is_compared_by_value(tmp_path, monkeypatch, top, head):
    monkeypatch.setattr(filling, "_PIECE", 4)
    tensors = _tensors()
    same = {**tensors, "top": tensors["top"].astype(top), "head": tensors["top"].astype(head)}
    if {top, head} == {np.float16, ml_dtypes.bfloat16}:  # neither holds the other's values
        same["top"] = np.round(tensors["top"]).astype(top)
        same["head"] = same["top"].astype(head)
    source = _source(tmp_path, same)
    next(_stream(matching.check(TABLE, source.tensors, _targets()), source))
    same["head"] = same["head"].copy()
    same["head"][-1, -1] += 1
    source = _source(tmp_path, same)
    dtypes = "" if top == head else f", {made.DTYPE_NAMES[np.dtype(head).name]} and "
    with pytest.raises(CheckpointError, match=f"head differs from top{dtypes}"):
        next(_stream(matching.check(TABLE, source.tensors, _targets()), source))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(tmp_path, monkeypatch, dtype, value):
    monkeypatch.setattr(filling, "_PIECE", 4)
    up = np.full((3, 5), np.finfo(np.float16).max, dtype)  # large is fine
    tensors = _tensors(**{"layers.1.up": up.copy()})
    source = _source(tmp_path, tensors)
    assert len(list(_stream(matching.check(TABLE, source.tensors, _targets()), source))) == 5
    up[2, 4] = value
    source = _source(tmp_path, tensors | {"layers.1.up": up})
    with pytest.raises(CheckpointError, match=r"layers\.1\.up contains NaN or infinity.*download it again"):
        list(_stream(matching.check(TABLE, source.tensors, _targets()), source))
