"""The options of `/v1/responses` that the answer repeats, and those about its form."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Final

from gptjax.engine.request import MAX_TOP_LOGPROBS
from gptjax.errors import GptjaxError
from gptjax.server.errors import as_json, bad_request, of_gptjax
from gptjax.server.generation.shared_fields import read_parallel
from gptjax.server.http.fields import Fields
from gptjax.structured import Grammar
from gptjax.structured.wishes import described, read_response_format
from gptjax.text.harmony.messages import ResponseFormat

_MOST_REPEATED: Final = 1 << 20  # characters of JSON; a stream repeats them three times
_DEEPEST: Final = 100
_OF_TOOLS: Final = ("type", "name", "description", "parameters", "strict", "tools")
_ENCRYPTED: Final = "reasoning.encrypted_content"
_LOGPROBS: Final = "message.output_text.logprobs"
# Parts of items that never occur in answers here.
_INCLUDABLE: Final = frozenset(
    """code_interpreter_call.outputs computer_call_output.output.image_url file_search_call.results
    message.input_image.image_url web_search_call.action.sources web_search_call.results""".split()
)
_VERBOSITIES: Final = ("low", "medium", "high")
_MOST_PAIRS: Final = 16  # of metadata; this and the lengths of keys and values are OpenAI's
_LONGEST_KEY: Final = 64
_LONGEST_VALUE: Final = 512


@dataclasses.dataclass(frozen=True)
class Include:
    """What items have only if it is asked for."""

    encrypted: bool = False  # the reasoning also as `encrypted_content`
    top_logprobs: int | None = None  # alternatives to each token of a text; None: no log-probabilities


def read_include(fields: Fields) -> Include:
    """`include` and `top_logprobs`. Raises `ApiError` for an unsupported entry."""
    given, top = fields.take("include"), fields.whole("top_logprobs", 0, MAX_TOP_LOGPROBS)
    if given is None:
        given = []
    if not isinstance(given, list):
        raise bad_request(f"include must be a list, found {as_json(given)}", "include")
    for name in given:
        if not isinstance(name, str) or name not in {_ENCRYPTED, _LOGPROBS, *_INCLUDABLE}:
            raise bad_request(f"include {as_json(name)} is not supported", "include", "unsupported")
    if top and _LOGPROBS not in given:
        raise bad_request(f"top_logprobs requires include: [{as_json(_LOGPROBS)}]", "top_logprobs")
    return Include(_ENCRYPTED in given, (top or 0) if _LOGPROBS in given else None)


def read_truncation(fields: Fields) -> str:
    """`truncation`. Raises `ApiError`."""
    given = fields.text("truncation") or "disabled"
    if given not in ("auto", "disabled"):
        raise bad_request(f"truncation is {as_json(given)}; expected auto or disabled", "truncation")
    return given


def read_text(fields: Fields) -> tuple[dict[str, Any], Grammar | None, ResponseFormat | None]:
    """`text` as the answer repeats it, what the text must be, and what to say of that. Raises `ApiError`."""
    found: dict[str, Any] = {"format": {"type": "text"}, "verbosity": "medium"}
    options = fields.options("text")
    form = options.take("format")
    try:
        grammar, about = read_response_format(form, "text.format"), described(form)
    except GptjaxError as error:
        raise of_gptjax(error, "text") from None
    if isinstance(form, dict):
        found["format"] = form
    verbosity = options.take("verbosity")
    if verbosity is not None:
        if verbosity not in _VERBOSITIES:
            message = f"text.verbosity is {as_json(verbosity)}; expected one of {', '.join(_VERBOSITIES)}"
            raise bad_request(message, "text.verbosity")
        found["verbosity"] = verbosity
    options.finish(())
    return found, grammar, about


def read_repeated(fields: Fields) -> dict[str, Any]:
    """The fields that the answer repeats as they are. Raises `ApiError`."""
    found: dict[str, Any] = {"metadata": _read_metadata(fields.take("metadata"))}
    for name in ("user", "safety_identifier", "prompt_cache_key"):
        found[name] = fields.text(name)
        if found[name] is not None and len(found[name]) > _LONGEST_VALUE:
            raise bad_request(f"{name} must have at most {_LONGEST_VALUE} characters", name)
    return found | {"parallel_tool_calls": read_parallel(fields)}


def _read_metadata(given: object) -> dict[str, str]:
    if given is None:
        return {}
    if isinstance(given, dict) and len(given) <= _MOST_PAIRS:
        fits = (
            isinstance(value, str) and len(key) <= _LONGEST_KEY and len(value) <= _LONGEST_VALUE
            for key, value in given.items()
        )
        if all(fits):
            return given
    raise bad_request(
        f"metadata must be an object of at most {_MOST_PAIRS} strings of at most {_LONGEST_VALUE} characters, with "
        f"keys of at most {_LONGEST_KEY}",
        "metadata",
    )


def repeated_tools(given: object) -> list[dict[str, Any]]:
    """The tools as the answer repeats them: the keys that are read and, for a function, all that clients expect."""
    found = []
    for tool in given if isinstance(given, list) else []:
        known = {name: tool[name] for name in _OF_TOOLS if name in tool} if isinstance(tool, dict) else {}
        whole = dict.fromkeys(_OF_TOOLS[:-1]) if known.get("type") == "function" else {}
        found.append({**whole, **known})
    return found


def check_repeated(repeated: Mapping[str, Any]) -> None:
    """Raises `ApiError` for a field too large or too deep for the answer to repeat."""
    for name, value in repeated.items():
        if _is_deep(value):
            raise bad_request(f"{name} is nested more than {_DEEPEST} levels deep", name, "too_large")
        if len(json.dumps(value, ensure_ascii=False)) > _MOST_REPEATED:
            message = f"{name} is larger than {_MOST_REPEATED} characters of JSON, which the answer would repeat"
            raise bad_request(f"{message}: shorten it", name, "too_large")


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(_DEEPEST):
        parents, level = level, []
        for parent in parents:
            if isinstance(parent, list | dict):
                level += parent.values() if isinstance(parent, dict) else parent
    return bool(level)
