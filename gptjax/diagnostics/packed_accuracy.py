"""What packed weights, or a cache in float8, cost in accuracy: compares a model with a rounded form of it."""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from convert.mxfp4 import chosen, packed_config, rounded, slices
from gptjax.config import ModelConfig
from gptjax.diagnostics.perplexity import Perplexity, predict
from gptjax.engine import memory
from gptjax.errors import GptjaxError, RequestError
from gptjax.language_model import LanguageModel
from gptjax.layers.observe import COLLECTION
from gptjax.layers.rope import inv_freq
from gptjax.models.packing import summed_last
from gptjax.models.params import Params, weights_by_path
from gptjax.models.registry import Model
from gptjax.support.plots import check_plot, save_plot
from gptjax.support.quoting import names
from gptjax.text import Tokenizer
from pallas_kernels.formats import is_packed
from pallas_kernels.formats.fragments import MXFP4Fragments
from pallas_kernels.formats.ggml.fragments import QuantizedFragments
from pallas_kernels.formats.ggml.weight import Rows
from pallas_kernels.formats.mxfp4 import MXFP4

# What is usually expected of a rounded model.
LEAST_COSINE: Final = 0.99
LEAST_AGREEMENT: Final = 0.95
MOST_CHANGE: Final = 0.01  # of the perplexity, relative

_HIDDEN_TOKENS: Final = 512  # the most whose hidden states are compared, since attention is not chunked here
_NUMBERS: Final = 1 << 22  # compared at a time in float64
_PACKING: Final = ("mxfp4", "types")  # the settings of a configuration that may differ
_RESIDUALS: Final = ("mlp_residual", "moe_residual")  # what a block's last stage is called


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far rounded numbers are from the originals."""

    name: str
    cosine: float  # of the angle between the two; 1 is the same direction
    error: float  # relative: the norm of the difference over that of the original


@dataclasses.dataclass(frozen=True)
class WeightDifference(Difference):
    """The same for a weight, and what its rounded numbers are in."""

    types: tuple[str, ...]  # packed ones, several if its parts differ; or a dtype


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A threshold, the value found, and whether it passes."""

    name: str
    found: str
    wanted: str
    holds: bool


@dataclasses.dataclass(frozen=True)
class Report:
    """A model compared with its rounded form."""

    weights: tuple[WeightDifference, ...]  # one for each rounded weight
    blocks: tuple[Difference, ...]  # of the hidden states after each block: means over positions
    agreement: float  # share of positions with the same most likely token, teacher-forced
    perplexity: Perplexity
    quantized_perplexity: Perplexity
    cache_dtype: str | None = None  # of the rounded form's keys and values, if the model's are not in it

    @property
    def types(self) -> tuple[str, ...]:
        """What the rounded weights are in, most weights first."""
        counted = collections.Counter(kind for row in self.weights for kind in row.types)
        return tuple(kind for kind, _ in counted.most_common())

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """One for each threshold."""
        cosines = [
            (what, min(rows, key=lambda row: row.cosine))
            for what, rows in (("weight", self.weights), ("block's hidden states", self.blocks))
            if rows
        ]
        change = self.quantized_perplexity.value / self.perplexity.value - 1
        return (
            *(
                Verdict(
                    f"the lowest cosine of a {what}",
                    f"{row.cosine:.5f}, {row.name}",
                    f"at least {LEAST_COSINE}",
                    row.cosine >= LEAST_COSINE,
                )
                for what, row in cosines
            ),
            Verdict(
                "the same most likely token",
                f"{self.agreement:.2%}",
                f"at least {LEAST_AGREEMENT:.0%}",
                self.agreement >= LEAST_AGREEMENT,
            ),
            Verdict(
                "the perplexity's change", f"{change:+.2%}", f"within {MOST_CHANGE:.0%}", abs(change) <= MOST_CHANGE
            ),
        )

    @property
    def passed(self) -> bool:
        """Whether all thresholds are met."""
        return all(verdict.holds for verdict in self.verdicts)


def quantized(lm: LanguageModel, targets: str) -> LanguageModel:
    """The model with "experts", "linear" or "all" rounded to MXFP4; other weights are shared, not copied.

    Raises:
      ConfigError: the model has no such weights, or they cannot be packed.
      RequestError: all of them are already packed.
    """
    config = packed_config(lm.config, targets)
    paths = chosen(lm.config, config)
    if not paths:
        raise RequestError(
            f"this checkpoint already has {targets!r} in MXFP4, so there is nothing to compare it with; name the float "
            "checkpoint that it was made from, and this one with --against"
        )

    def packed(path: tuple[Any, ...], leaf: Any) -> Any:
        names = tuple(key.key for key in path)
        if names not in paths:
            return leaf
        return MXFP4(*map(jnp.asarray, rounded(names, [np.asarray(leaf)], paths[names].shape)))

    params = jax.tree_util.tree_map_with_path(packed, lm.params, is_leaf=is_packed)
    return _with(lm, lm.model.clone(config=config), params)


def cached(lm: LanguageModel, dtype: str) -> LanguageModel:
    """The model with keys and values kept in another dtype, as by `gptjax.load(cache_dtype=)`. Weights are shared."""
    return _with(lm, lm.model.clone(cache_dtype=dtype), lm.params)


def _with(lm: LanguageModel, model: Model, params: Params) -> LanguageModel:
    """Another model and weights with the same tokenizer and limits."""
    tokenizer: Tokenizer | GptjaxError
    try:
        tokenizer = lm.tokenizer
    except GptjaxError as error:  # says why it has no tokenizer
        tokenizer = error
    return LanguageModel(model, params, tokenizer=tokenizer, defaults=lm.defaults, max_length=lm.max_length)


def validate(
    lm: LanguageModel,
    other: LanguageModel,
    token_ids: Sequence[int],
    *,
    advance: Callable[[int], None] = lambda count: None,
) -> Report:
    """Compares a model with its packed form on a text, in pieces of `lm.max_length` tokens.

    Args:
      lm: the original model; weights that it already has packed are not compared.
      other: the same model with more of it packed, or with numbers that were, or with keys and values kept in another
        dtype. Both models are in memory.
      advance: called after each piece of each model with its number of tokens.

    Raises:
      RequestError: the models differ in kind or size, `other` has nothing rounded that `lm` has as numbers, or the text
        has fewer than two tokens.
    """
    if unlike := _unlike(lm.config, other.config):
        raise RequestError(
            f"the two are not forms of the same model: their configurations differ in {names(unlike)}; name a "
            "checkpoint that was made from the first"
        )
    weights = tuple(_weights(lm.params, other.params))
    is_cached_alike = lm.model.cache_dtype == other.model.cache_dtype
    if not weights and is_cached_alike:
        raise RequestError(
            "the second has the same numbers as the first, or the first has them packed; name the float checkpoint "
            "first, and its packed form (a GGUF file, or what `gptjax convert --quantize` wrote) with --against"
        )
    before, after = (predict(each, token_ids, advance=advance) for each in (lm, other))
    return Report(
        weights=weights,
        blocks=tuple(_blocks(lm, other, token_ids[: min(_HIDDEN_TOKENS, lm.max_length)])),
        agreement=float((before.best == after.best).mean()),
        perplexity=Perplexity.of(before.losses),
        quantized_perplexity=Perplexity.of(after.losses),
        cache_dtype=None if is_cached_alike else other.model.cache_dtype,
    )


def plot(report: Report, path: str | Path) -> None:
    """Plots the relative errors by block: a line for each kind of weight, and one for the hidden states.

    Raises:
      RequestError: matplotlib is not installed, or the file cannot be written.
    """
    check_plot(path)
    from matplotlib.figure import Figure  # without pyplot: no window, no global state, only the file's backend
    from matplotlib.ticker import MaxNLocator

    lines: dict[str, list[tuple[int, float]]] = {}
    for row in report.weights:
        if (block := _block(row.name)) is not None:
            lines.setdefault(row.name.partition("/")[2], []).append((block, row.error))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for kind, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker=".", label=kind)
    axes.plot([row.error for row in report.blocks], marker="o", color="black", label="hidden states after the block")
    for row in report.weights:
        if _block(row.name) is None:
            axes.axhline(row.error, linestyle=":", color="gray", label=row.name)
    axes.set(xlabel="block", ylabel="relative error", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    save_plot(figure, path)


def _unlike(config: ModelConfig, other: ModelConfig) -> list[str]:
    """The settings in which two configurations are not of the same model, however its weights are stored."""
    if type(config) is not type(other):
        return ["architecture"]
    settings = [field.name for field in dataclasses.fields(config) if field.name not in _PACKING]
    unlike = [name for name in settings if getattr(config, name) != getattr(other, name)]
    if unlike == ["rope"]:  # a GGUF file may have the divisors that config.json has a formula for
        ours, theirs = (inv_freq(each.rope, each.head_width) for each in (config, other) if hasattr(each, "rope"))
        return [] if np.allclose(ours, theirs, rtol=1e-6, atol=0) else unlike
    return unlike


def _weights(params: Params, other: Params) -> Iterator[WeightDifference]:
    """The difference of each weight that is packed only in `other`, or has other numbers there."""
    numbers, rounded_ones = weights_by_path(params), weights_by_path(other)
    for path in sorted(numbers, key=_place):
        leaf, theirs = numbers[path], rounded_ones[path]
        if theirs is leaf or is_packed(leaf):
            continue
        if not is_packed(theirs):
            theirs = summed_last(path, theirs)
        found = _difference("/".join(path), _pairs(summed_last(path, leaf), theirs))
        if is_packed(theirs) or found.error:
            yield WeightDifference(**dataclasses.asdict(found), types=_types(theirs))


def _types(weight: Any) -> tuple[str, ...]:
    """What a weight's numbers are in."""
    return tuple(dict.fromkeys(_type(part) for part in (weight.parts if isinstance(weight, Rows) else (weight,))))


def _type(part: Any) -> str:
    if isinstance(part, MXFP4 | MXFP4Fragments):
        return "MXFP4"
    return str(part.type if is_packed(part) else part.dtype.name)


def _place(path: tuple[str, ...]) -> tuple[bool, int, tuple[str, ...]]:
    """A sort key: blocks by number, then everything else."""
    block = _block(path[0])
    return block is None, block or 0, path


def _block(name: str) -> int | None:
    """The number of the block that a name begins with, if any."""
    match = re.match(r"block_(\d+)(/|$)", name)
    return None if match is None else int(match[1])


def _pairs(array: jax.Array, other: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The values of both, packed or not in `other`, a slice at a time, in float64."""
    if isinstance(other, Rows):
        start = 0
        for part in other.parts:
            yield from _pairs(array[start : start + part.shape[0]], part)
            start += part.shape[0]
        return
    if isinstance(other, MXFP4Fragments):
        other = other.unpacked()
    elif isinstance(other, QuantizedFragments):  # which has no slices
        other = other.dequantize()
    if array.ndim == 1:
        array, other = array[None], other[None]
    for index in slices(array.shape, _NUMBERS):
        theirs = other[index].dequantize() if is_packed(other) else other[index]
        yield np.asarray(array[index], np.float64), np.asarray(theirs, np.float64)


def _difference(name: str, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Difference:
    products = sum(
        np.array([np.vdot(ours, theirs), np.vdot(ours, ours), np.vdot(theirs, theirs), np.square(theirs - ours).sum()])
        for ours, theirs in pairs
    )
    dot, square, other_square, error = map(float, np.asarray(products))
    return Difference(name, *_measures(dot, square, other_square, error))


def _measures(dot: float, square: float, other_square: float, error: float) -> tuple[float, float]:
    """Cosine and relative error; 1 and 0 if both arrays are 0."""
    if not square or not other_square:
        return float(square == other_square), math.sqrt(error / square) if square else float(bool(error))
    return dot / math.sqrt(square * other_square), math.sqrt(error / square)


def _blocks(lm: LanguageModel, other: LanguageModel, token_ids: Sequence[int]) -> Iterator[Difference]:
    """The differences of the hidden states after each block, as means over positions, since their norms vary widely."""
    tokens_BT = jnp.asarray([list(token_ids)], jnp.int32)
    with memory.explained(lm.model, batch=1, max_length=tokens_BT.shape[1]):
        ours, theirs = (_hidden(each.model, each.params, tokens_BT) for each in (lm, other))
        for layer, (a_TD, b_TD) in enumerate(zip(ours, theirs, strict=True)):
            a_TD, b_TD = np.asarray(a_TD, np.float64), np.asarray(b_TD, np.float64)
            rows = [_measures(a @ b, a @ a, b @ b, np.square(b - a).sum()) for a, b in zip(a_TD, b_TD, strict=True)]
            cosine, error = np.mean(rows, axis=0)
            yield Difference(f"block_{layer}", float(cosine), float(error))


@partial(jax.jit, static_argnames=("model",))
def _hidden(model: Model, params: Params, tokens_BT: jax.Array) -> list[jax.Array]:
    """The first row's hidden states [T, D] after each block."""
    positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    _, recorded = model.apply({"params": params}, tokens_BT, positions_BT, mutable=[COLLECTION])
    blocks = [recorded[COLLECTION][f"block_{layer}"] for layer in range(model.config.num_layers)]
    return [next(block[name][0] for name in _RESIDUALS if name in block) for block in blocks]
