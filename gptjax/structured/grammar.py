"""What a text must be, as plain data, and whether llguidance understands it."""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Self

from gptjax.errors import RequestError
from gptjax.structured.library import library, limits
from gptjax.structured.places import place_of, without_nulls

LONGEST: Final = 1 << 17  # characters; compiling a schema of that length can take seconds
_DEEPEST: Final = 100  # levels of a schema
# Between the tokens of JSON: a space, or a line end and an indent. A model in a muddle could go on for ever.
_WHITESPACE: Final = r"( |\r?\n[ \t]{0,16})?"
_OPTIONS: Final = {"whitespace_flexible": True, "whitespace_pattern": _WHITESPACE, "coerce_one_of": False}
_STRICT: Final = {"item_separator": ",", "key_separator": ":", "lenient": False}


@dataclass(frozen=True)
class Grammar:
    """What a text must be. Made by `of_json_schema`, `of_json_object`, `of_regex`, `of_choice` and `of_lark`.

    These check it.

    JSON schemas and regular expressions never allow a special token. A Lark grammar can name one.
    """

    body: str
    """An expression of llguidance's Lark."""
    rules: str = ""
    """Further rules that it uses."""

    @classmethod
    def of_json_schema(cls, schema: Mapping[str, Any]) -> Self:
        """JSON that is valid by a schema: draft 7 or 2020-12, as far as llguidance knows their keywords.

        Raises:
          RequestError: a keyword that it does not know; the message names it, and its place.
        """
        made = cls(_of_schema(schema))
        if fault := _fault_of_schema(schema):
            raise RequestError(f"{place_of(schema, _fault_of_schema)}: {fault}")
        return made

    @classmethod
    def of_json_object(cls) -> Self:
        """Any JSON object."""
        return cls.of_json_schema({"type": "object"})

    @classmethod
    def of_regex(cls, pattern: str) -> Self:
        """A text that a regular expression matches as a whole. It has no look-around and no references.

        Raises:
          RequestError: it cannot be compiled.
        """
        _check_text(pattern, "a regular expression")
        return cls("/" + _escaped(pattern) + "/").check("the regular expression")

    @classmethod
    def of_lark(cls, text: str) -> Self:
        """A text of a Lark grammar, in llguidance's dialect, whose first rule is `start`.

        Raises:
          RequestError: it cannot be compiled.
        """
        _check_text(text, "a grammar")
        return cls("%lark {\n" + text + "\n}").check("the grammar")

    @classmethod
    def of_choice(cls, texts: Sequence[str]) -> Self:
        """One of several texts.

        Raises:
          RequestError: there are none, or one is empty or not a text.
        """
        if not isinstance(texts, Sequence) or isinstance(texts, str) or not texts:
            raise RequestError("it must be a list of at least one text")
        for text in texts:
            _check_text(text, "a choice")
            if not text:
                raise RequestError("a choice must not be empty")
        body = f"({' | '.join(json.dumps(text, ensure_ascii=False) for text in texts)})"
        _check_length(body)
        return cls(body).check("the choice")

    @property
    def source(self) -> str:
        """The whole as a Lark grammar."""
        return f"start: {self.body}\n{self.rules}"

    def check(self, name: str) -> Self:
        """The same. Raises `RequestError` if it cannot be compiled, or without llguidance."""
        if fault := _fault(self.source):
            raise RequestError(f"{name} cannot be compiled: {fault}")
        return self


def as_grammar(value: object) -> Grammar:
    """What callers may give for a grammar: a JSON schema, the text of a Lark grammar, or a `Grammar`."""
    if isinstance(value, Grammar):
        return value
    if isinstance(value, Mapping):
        return Grammar.of_json_schema(value)
    if isinstance(value, str):
        return Grammar.of_lark(value)
    raise RequestError(f"a grammar is a JSON schema, a Lark grammar or a gptjax.Grammar, found {type(value).__name__}")


def _of_schema(schema: object) -> str:
    if not isinstance(schema, Mapping):
        raise RequestError(f"a JSON schema must be an object, found {type(schema).__name__}")
    _check_depth(schema)
    try:
        text = json.dumps({**without_nulls(schema), "x-guidance": _OPTIONS | _STRICT}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RequestError(f"a JSON schema must be JSON: {error}") from None
    _check_length(text)
    return f"%json {text}"


def _fault_of_schema(schema: Mapping[str, Any]) -> str | None:
    inner = itertools.chain.from_iterable(itertools.islice(_levels(schema), 1, None))
    if any(isinstance(each, Mapping) and "$ref" in each and "$id" in each for each in inner):
        return "a $ref and an $id side by side mean different things in draft 7 and later drafts"
    return _fault(f"start: {_of_schema(schema)}")


def _fault(source: str) -> str | None:
    matcher = library().LLMatcher(_bytes(), source, log_level=0, limits=limits())
    if matcher.is_error():
        return _shortened(matcher.get_error())
    matcher.compute_bitmask()
    return "no text can be of this form" if matcher.is_error() else None


@cache
def _bytes() -> Any:
    """A vocabulary of bytes: whether a grammar is sound does not depend on a model's, which takes long to build."""
    return library().LLTokenizer(library().TokenizerWrapper(_Bytes()))


class _Bytes:
    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([byte]) for byte in range(256)), b"<end>")
    special_token_ids = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def _shortened(message: str) -> str:
    """A message without the place in the source, which is not the user's, and without the source."""
    lines = [line.strip() for line in message.splitlines() if not re.match(r"\s*(\d+ )?\| |\s*\^*\s*$", line)]
    text = re.sub(r"^(\d+\(\d+\): |at \d+\(\d+\): )+", "", " ".join(lines))
    text = text.removeprefix("failed to compile JSON schema: ")
    return text if len(text) <= 300 else f"{text[:150]} [...] {text[-150:]}"


def _check_text(text: object, name: str) -> None:
    if not isinstance(text, str):
        raise RequestError(f"{name} must be text, found {type(text).__name__}")
    _check_length(text)


def _check_length(text: str) -> None:
    if len(text) > LONGEST:
        raise RequestError(f"it has {len(text)} characters, more than {LONGEST}: make it simpler")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError("it has a lone surrogate, which is not a character") from None


def _check_depth(schema: object) -> None:
    """Raises `RequestError` for a schema that is nested so deep that recursion may not reach its bottom."""
    if next(itertools.islice(_levels(schema), _DEEPEST, None), None) is not None:
        raise RequestError(f"a JSON schema may be nested {_DEEPEST} levels deep, but this one is deeper")


def _levels(value: object) -> Iterator[list[object]]:
    """The values of JSON, level by level."""
    level = [value]
    while level:
        yield level
        level = [
            child
            for parent in level
            if isinstance(parent, Mapping | list | tuple)
            for child in (parent.values() if isinstance(parent, Mapping) else parent)
        ]


def _escaped(pattern: str) -> str:
    """A regular expression between slashes: only slashes that are not escaped, and line ends, must be written so."""
    found = re.sub(r"\\.|/", lambda match: match.group() if len(match.group()) == 2 else r"\/", pattern, flags=re.S)
    return found.replace("\n", r"\n").replace("\r", r"\r")
