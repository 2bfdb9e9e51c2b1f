"""The options of a generation call: names, types and meaning, once, for `generate`, `stream` and the command line."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from gptjax.config import GenerationDefaults
from gptjax.engine.request import Request, SamplingParams
from gptjax.errors import RequestError

Prompt = str | Sequence[int] | np.ndarray
DEFAULT_MAX_TOKENS = 256


class SamplingOptions(TypedDict, total=False):
    """How tokens are drawn; what is not given follows the checkpoint's `generation_config.json`, else is greedy.

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
    seed: int
    top_logprobs: int


class GenerateOptions(SamplingOptions, total=False):
    """Sampling, and when to stop."""

    max_tokens: int  # 256 if not given
    stop: str | Sequence[str]  # text that ends the output and is not part of it
    stop_ids: Sequence[int]  # tokens that end the output, besides the checkpoint's end-of-text ids
    ignore_eos: bool  # do not end at the checkpoint's end-of-text ids


def split_prompts(prompts: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """The prompts as a list, and whether it was one prompt by itself. Raises `RequestError` for an empty list."""
    if isinstance(prompts, str):
        return [prompts], True
    if isinstance(prompts, np.ndarray):
        prompts = prompts.tolist()
    if not isinstance(prompts, Sequence):
        raise RequestError(f"a prompt is text or a list of token ids, found {type(prompts).__name__}")
    if not prompts:
        raise RequestError("there is no prompt: give text, a list of token ids, or a list of such prompts")
    if isinstance(prompts[0], str | Sequence | np.ndarray):
        return [p.tolist() if isinstance(p, np.ndarray) else p for p in prompts], False  # type: ignore[misc]
    return [prompts], True  # type: ignore[list-item]


def sampling_params(options: Mapping[str, Any], defaults: GenerationDefaults) -> SamplingParams:
    """The sampling settings of a call. Raises `RequestError` for an option there is not."""
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    _refuse_unknown(options, names)
    shared = {field.name for field in dataclasses.fields(GenerationDefaults)} & set(names)
    given = {name: value for name, value in options.items() if value is not None}
    return SamplingParams(**{name: getattr(defaults, name) for name in shared} | given)


def make_request(
    prompt_ids: Sequence[int], options: Mapping[str, Any], defaults: GenerationDefaults, eos_ids: Sequence[int]
) -> Request:
    """The request of one prompt, with a seed, not yet checked. Raises `RequestError` for an option there is not."""
    own = GenerateOptions.__annotations__.keys() - SamplingOptions.__annotations__.keys()
    _refuse_unknown(options, GenerateOptions.__annotations__)
    sampling = sampling_params({name: value for name, value in options.items() if name not in own}, defaults)
    stop, stop_ids = options.get("stop") or (), options.get("stop_ids") or ()
    if not isinstance(stop, str | Sequence) or not isinstance(stop_ids, Sequence) or isinstance(stop_ids, str):
        raise RequestError("stop must be text or a list of texts, and stop_ids a list of token ids")
    max_tokens = options.get("max_tokens")
    request = Request(
        prompt_ids=tuple(prompt_ids),
        max_tokens=DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
        params=sampling,
        stop_ids=frozenset([*stop_ids, *(() if options.get("ignore_eos") else eos_ids)]),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
    )
    return request.with_seed()


def _refuse_unknown(options: Mapping[str, Any], known: Sequence[str] | Mapping[str, Any]) -> None:
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(known))}"
            raise RequestError(f"there is no option {name!r}; {hint}")
