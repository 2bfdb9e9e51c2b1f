"""The parts of a BPE, checked."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptjax.support.files import raise_damaged
from gptjax.support.quoting import quoted
from gptjax.text.spelling import BYTE_LEVEL, Spelling


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is matched whole in the text, before any merge."""

    content: str
    id: int
    special: bool
    lstrip: bool = False
    """Swallows the white space before it; `rstrip` swallows that after it."""
    rstrip: bool = False
    single_word: bool = False
    """Is not matched inside a word."""
    normalized: bool = False
    """Whether it is itself normalized, and matched after normalization of the text."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A BPE. `ids` holds no special token, so ordinary text cannot become one, whatever it says."""

    file: Path
    """Its source, for messages."""
    ids: dict[str, int]
    """Spelled token to id."""
    merges: list[tuple[str, str]]
    added: tuple[AddedToken, ...]
    normalizer: Any
    """As in tokenizer.json, like `pre_tokenizer`."""
    pre_tokenizer: Any
    ignore_merges: bool
    """A word that is a token becomes that token, whether or not the merges lead there."""
    post_processor: Any
    """As in tokenizer.json; it adds tokens around a text."""
    ordinary: tuple[AddedToken, ...]
    """Special tokens that ordinary text also contains, such as "!" if it is the padding. They are matched whole only if
    special tokens are looked for, and shown like any other text."""
    spelling: Spelling
    strips_space: bool
    """Whether a decoded text loses the space that it begins with, which encoding put there."""


def build_vocabulary(
    file: Path,
    ids: object,
    merges: list[tuple[str, str]],
    added: Iterable[AddedToken],
    *,
    normalizer: Any = None,
    pre_tokenizer: Any = None,
    ignore_merges: bool = False,
    post_processor: Any = None,
    spelling: Spelling = BYTE_LEVEL,
    strips_space: bool = False,
) -> Vocabulary:
    """Checks the parts against each other. Raises CheckpointError, naming `file`."""
    known = _checked_ids(file, ids)
    built = _checked_merges(file, known, merges)
    names = {number: token for token, number in known.items()}
    tokens = tuple(added)
    _check_added(file, known, names, tokens, spelling)
    ordinary = tuple(token for token in tokens if token.special and _is_ordinary(names.get(token.id, ""), built))
    kept = tuple(token for token in tokens if token not in ordinary)
    hidden = {token.id for token in kept if token.special}
    plain = {token: number for token, number in known.items() if number not in hidden}
    return Vocabulary(
        file,
        plain,
        merges,
        kept,
        normalizer,
        pre_tokenizer,
        ignore_merges,
        post_processor,
        ordinary,
        spelling,
        strips_space,
    )


def _checked_ids(file: Path, ids: object) -> dict[str, int]:
    if not isinstance(ids, dict) or not ids:
        raise_damaged(file, "its vocabulary is not an object of tokens and ids")
    for token, number in ids.items():
        if type(number) is not int or not 0 <= number < 2**32:
            raise_damaged(
                file, f"token {quoted(token)} has the id {quoted(number)}, not an integer from 0 to 2**32 - 1"
            )
        if not is_text(token):
            raise_damaged(file, f"token {quoted(token)} has half a surrogate pair")
    if len(set(ids.values())) != len(ids):
        raise_damaged(file, "two tokens have the same id")
    return ids


def _checked_merges(file: Path, ids: Mapping[str, int], merges: list[tuple[str, str]]) -> set[str]:
    """The tokens that the merges build. (The `tokenizers` library panics on some merges of unknown tokens.)"""
    built = set()
    for left, right in merges:
        if left not in ids or right not in ids or left + right not in ids:
            raise_damaged(
                file, f"the merge of {quoted(left)} and {quoted(right)} needs a token that the vocabulary lacks"
            )
        built.add(left + right)
    return built


def _check_added(
    file: Path, ids: Mapping[str, int], names: Mapping[int, str], added: Sequence[AddedToken], spelling: Spelling
) -> None:
    for token in added:
        if not is_text(token.content) or not 0 <= token.id < 2**32:
            raise_damaged(
                file, f"the added token {quoted(token.content)} has half a surrogate pair or the id {quoted(token.id)}"
            )
        data = spelling.added_bytes(token.content)
        other_text = token.id in names and spelling.token_bytes(names[token.id]) != data
        other_id = ids.get(token.content, token.id) != token.id and spelling.token_bytes(token.content) == data
        if other_text or other_id:
            raise_damaged(file, f"the added token {quoted(token.content)} (id {token.id}) contradicts the vocabulary")
    if not len(added) == len({token.id for token in added}) == len({token.content for token in added}):
        raise_damaged(file, "two added tokens have the same content or id")


def _is_ordinary(name: str, built: Set[str]) -> bool:
    """Whether ordinary text contains this token, as when "!" is the padding: hiding it would drop it from text."""
    return len(name) == 1 or name in built


def is_text(value: str) -> bool:
    """Whether a string holds no lone surrogate, so that it can be written as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
