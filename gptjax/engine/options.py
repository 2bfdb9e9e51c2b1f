"""The options of a generation call: names, types and meaning, shared by `generate`, `stream` and the command line."""

import dataclasses
import difflib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from gptjax.config import GenerationDefaults
from gptjax.engine.request import Request, SamplingParams
from gptjax.errors import RequestError
from gptjax.structured import Grammar
from gptjax.structured.grammar import as_grammar
from gptjax.support.quoting import quoted

Prompt = str | Sequence[int] | np.ndarray
DEFAULT_MAX_TOKENS = 256
_BYTES = (bytes, bytearray, memoryview)  # sequences of integers, but not token ids


class SamplingOptions(TypedDict, total=False):
    """How tokens are drawn. Defaults come from the checkpoint's `generation_config.json`; without it, greedy.

    See `gptjax.engine.request.SamplingParams` for the meaning of each.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | Sequence[int]  # one for all rows, or a list of one for each prompt


class GenerateOptions(SamplingOptions, total=False):
    """Sampling options, and when to stop."""

    top_logprobs: int  # alternatives to report with each token
    max_tokens: int  # 256 by default
    stop: str | Sequence[str]  # text that ends the output and is not part of it
    stop_ids: int | Sequence[int]  # tokens that end the output, in addition to the checkpoint's end-of-text ids
    ignore_eos: bool  # do not end at the checkpoint's end-of-text ids
    grammar: Grammar | Mapping[str, Any] | str | None  # what the output must be: a JSON schema, or a Lark grammar
    special: bool  # parse special tokens written in a text prompt; otherwise they are plain text


def split_prompts(prompts: object) -> tuple[list[Any], bool]:
    """The prompts as a list, and whether a single prompt was given. Raises `RequestError` for an empty list.

    Arrays become lists; the prompts themselves are not checked here.
    """
    prompts = plain(prompts)
    if isinstance(prompts, str):
        return [prompts], True
    if not isinstance(prompts, Sequence) or isinstance(prompts, _BYTES):
        raise RequestError(f"a prompt is text or a list of token ids, found {type(prompts).__name__}")
    if not prompts:
        raise RequestError("no prompt was given: pass text, a list of token ids, or a list of such prompts")
    listed = [plain(prompt) for prompt in prompts]
    if isinstance(listed[0], str | Sequence):
        return listed, False
    return [listed], True


def as_ids(token_ids: object) -> list[Any]:
    """Token ids as a list; its items are not checked here. Raises `RequestError` for anything that is not a list."""
    ids = plain(token_ids)
    if not isinstance(ids, Sequence) or isinstance(ids, (str, *_BYTES)):
        raise RequestError(f"expected a list of token ids, found {type(token_ids).__name__}")
    return [plain(token) for token in ids]


def split_seeds(seed: object, rows: int) -> list[Any]:
    """A seed for each row, from one for all or a list of one each. Raises `RequestError` if the numbers differ."""
    seed = plain(seed)
    if not isinstance(seed, Sequence) or isinstance(seed, str):
        return [seed] * rows
    if len(seed) != rows:
        raise RequestError(f"{rows} prompts but {len(seed)} seeds: give one seed for all, or one for each")
    return list(seed)


def plain(value: Any) -> Any:
    """NumPy and JAX arrays and scalars as Python's own; anything else unchanged."""
    jax: Any = sys.modules.get("jax")  # without it there are no arrays of it: a server's own process does not import it
    is_array = isinstance(value, np.ndarray | np.generic) or (jax is not None and isinstance(value, jax.Array))
    return np.asarray(value).tolist() if is_array else value


def sampling_params(options: Mapping[str, Any], defaults: GenerationDefaults) -> SamplingParams:
    """The sampling settings of a call.

    Raises:
      RequestError: an unknown option.
      ConfigError: the checkpoint has unsupported settings that the options do not replace.
    """
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    _refuse_unknown(options, sorted(names))
    shared = {field.name for field in dataclasses.fields(GenerationDefaults)} & names
    given = {name: plain(value) for name, value in options.items() if value is not None}
    defaults.check(given, draws=given.get("temperature", defaults.temperature) != 0)
    if isinstance(bias := given.get("logit_bias"), Mapping):
        given["logit_bias"] = {plain(token): plain(value) for token, value in bias.items()}
    return SamplingParams(**{name: getattr(defaults, name) for name in shared} | given)


def make_request(
    prompt_ids: Sequence[int], options: Mapping[str, Any], defaults: GenerationDefaults, eos_ids: Sequence[int]
) -> Request:
    """The request for one prompt, with a seed, not yet checked.

    Raises:
      RequestError: an unknown option.
      ConfigError: as for `sampling_params`.
    """
    _refuse_unknown(options, GenerateOptions.__annotations__)
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    sampling = sampling_params({name: value for name, value in options.items() if name in names}, defaults)
    stop = _listed("stop", options.get("stop"), alone=str, of="texts")
    stop_ids = _listed("stop_ids", options.get("stop_ids"), alone=int, of="token ids")
    max_tokens = plain(options.get("max_tokens"))
    if not _flag(options, "ignore_eos"):
        stop_ids += eos_ids
    grammar = options.get("grammar")
    request = Request(
        prompt_ids=prompt_ids if isinstance(prompt_ids, tuple) else tuple(prompt_ids),
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        params=sampling,
        stop_ids=tuple(stop_ids),
        stop=tuple(stop),
        grammar=None if grammar is None else as_grammar(grammar),
    )
    return request.with_seed()


def special_of(options: Mapping[str, Any]) -> bool:
    """The option `special`. Raises `RequestError` if it is neither true nor false."""
    return _flag(options, "special")


def _flag(options: Mapping[str, Any], name: str) -> bool:
    value = plain(options.get(name))
    if value is None:
        return False
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false, found {quoted(value)}")
    return value


def _listed(name: str, value: Any, *, alone: type, of: str) -> list[Any]:
    """An option that takes one value or a list of them, as a list."""
    value = plain(value)
    if value is None:
        return []
    if isinstance(value, alone):
        return [value]
    if not isinstance(value, Sequence | frozenset | set) or isinstance(value, str | bytes):
        raise RequestError(f"{name} must be a list of {of}, found {type(value).__name__}")
    return [plain(item) for item in value]


def _refuse_unknown(options: Mapping[str, Any], known: Sequence[str] | Mapping[str, Any]) -> None:
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(sorted(known))}"
            raise RequestError(f"unknown option {quoted(name)}; {hint}")
