"""Suffixes of arrays are read as `gptjax.axes` has them: each letter is in the glossary, and keeps its one meaning."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptjax.axes import GLOSSARY

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("pallas_kernels", "gptjax", "convert")
FILES = {str(file.relative_to(ROOT)): file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")}
# A name in small letters, then its axes. A small letter among these is a tile of that axis, a number a fixed size (a
# 2 before a letter: twice that axis).
SUFFIXED = re.compile(r"_?[a-z][a-z0-9_]*_((?=[a-z0-9]*[A-Z])[A-Za-z0-9]+)")
NUMBER = re.compile(r"\d+")


def _axes(name: str) -> str | None:
    """The axes of a name such as `q_BTNH`; None where it has none."""
    found = SUFFIXED.fullmatch(name)
    return found[1] if found else None


def _names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Parameters, variables, and fields of classes, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr


def _unpacked(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """What the source says the letters of an array's shape are: (line, letter bound, letter of the suffix)."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            yield from _pairs(target, node.value)


def _pairs(target: ast.expr, value: ast.expr) -> Iterator[tuple[int, str, str]]:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        for each, part in zip(target.elts, value.elts, strict=True):
            yield from _pairs(each, part)
        return
    axes = _shape(value)
    if axes is None:
        return
    if isinstance(axes, str) and isinstance(target, ast.Name):  # B = x_BT.shape[0]
        axes, targets = [axes], [target]
    elif isinstance(axes, list) and isinstance(target, ast.Tuple):  # B, T = x_BT.shape
        targets = target.elts
        if any(isinstance(each, ast.Starred) for each in targets):
            return
        assert len(targets) == len(axes), f"line {target.lineno}: {len(targets)} names for the axes {axes}"
    else:
        return
    for each, axis in zip(targets, axes, strict=True):
        if isinstance(each, ast.Name) and re.fullmatch("[A-Z]", each.id):
            yield each.lineno, each.id, axis


def _shape(value: ast.expr) -> list[str] | str | None:
    """The axes of `x_BT.shape`, `x_BT.shape[1:]` or `x_BT.shape[0]`."""
    index = None
    if isinstance(value, ast.Subscript):
        value, index = value.value, value.slice
    if not (isinstance(value, ast.Attribute) and value.attr == "shape"):
        return None
    array = value.value
    name = array.id if isinstance(array, ast.Name) else array.attr if isinstance(array, ast.Attribute) else ""
    suffix = _axes(name)
    if suffix is None:
        return None
    axes = re.findall(r"2[A-Z]|1|\d+|[A-Za-z]", suffix)
    if index is None:
        return axes
    if isinstance(index, ast.Slice):
        bounds = [None if each is None else ast.literal_eval(each) for each in (index.lower, index.upper)]
        return axes[slice(*bounds)]
    try:
        found: str = axes[ast.literal_eval(index)]
    except ValueError:  # an index that is a variable
        return None
    return found


@pytest.mark.parametrize("file", sorted(FILES))
def test_each_letter_of_a_suffix_is_in_the_glossary(file):
    unknown = {
        f"{file}:{line}: {name}: {letter}"
        for line, name in _names(ast.parse(FILES[file].read_text()))
        for letter in NUMBER.sub("", _axes(name) or "")
        if letter.upper() not in GLOSSARY
    }
    assert not unknown


@pytest.mark.parametrize("file", sorted(FILES))
def test_a_letter_is_bound_to_the_axis_that_it_names(file):
    wrong = {
        f"{file}:{line}: {letter} is bound to the axis {axis}"
        for line, letter, axis in _unpacked(ast.parse(FILES[file].read_text()))
        if letter != axis
    }
    assert not wrong


@pytest.mark.parametrize(
    ("source", "bound"),
    [
        ("G, M = rows_GR.shape", [("G", "G"), ("M", "R")]),
        ("T, K = x_TI.shape", [("T", "T"), ("K", "I")]),
        ("B, K, S = self.k_BKSH.shape[:3]", [("B", "B"), ("K", "K"), ("S", "S")]),
        ("N = x_TI.shape[-1]", [("N", "I")]),
        ("X, S = experts_1X.shape[1], moments_TN2.shape[2]", [("X", "X"), ("S", "2")]),
        ("(T, X), E = experts_TX.shape, bias_E2F.shape[1]", [("T", "T"), ("X", "X"), ("E", "2F")]),
        ("*lead, K = x_TI.shape", []),
        ("rows, inputs = x_TI.shape", []),
    ],
)
def test_bindings_are_found(source, bound):
    assert [(letter, axis) for _, letter, axis in _unpacked(ast.parse(source))] == bound


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("q_BTNH", "BTNH"),
        ("_x_T", "T"),
        ("gate_up_bias_E2F", "E2F"),
        ("out_tH", "tH"),
        ("MOST_ROWS", None),
        ("x", None),
    ],
)
def test_suffixes_are_found(name, axes):
    assert _axes(name) == axes
