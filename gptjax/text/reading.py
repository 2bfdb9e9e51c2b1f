"""Reads a tokenizer's files: `tokenizer.json`, or GPT-2's `vocab.json` and `merges.txt`."""

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gptjax.errors import CheckpointError, ConfigError
from gptjax.support.files import raise_damaged, read_json, read_text
from gptjax.support.quoting import quoted, shown
from gptjax.text.additions import read_additions, special_tokens
from gptjax.text.framing import Token, post_processor
from gptjax.text.kinds import adds_space, parts, spelling_of, strips_space
from gptjax.text.spelling import SENTENCEPIECE, Spelling
from gptjax.text.vocabulary import AddedToken, Vocabulary, build_vocabulary

END_OF_TEXT = "<|endoftext|>"
# Vocabularies hold a handful of tokens that no merge builds (special ones); a truncated merges.txt leaves thousands.
_MOST_UNBUILT = 100
_OTHER_CUTS = ("gpt_oss", "llama", "qwen2")
_GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
# Such a token begins a message, though DeepSeek's files say it is not special: any text could then begin one. GGUF's
# converter makes the same exception.
_DEEPSEEK = re.compile("<｜.+｜>")


def read_vocabulary(
    directory: Path, settings: Mapping[str, Any], special: Mapping[str, Any], model_type: object
) -> Vocabulary:
    """The vocabulary of a directory, given its tokenizer_config.json, special_tokens_map.json and `model_type`.

    Raises:
      CheckpointError: files are missing or damaged.
      ConfigError: the tokenizer is neither a byte-level nor a SentencePiece BPE.
    """
    path = directory / "tokenizer.json"
    found = read_json(path)
    if found is not None:
        return _from_tokenizer_json(path, found, settings, read_additions(directory, settings, special))
    ids, merges = read_json(directory / "vocab.json"), read_text(directory / "merges.txt")
    if ids is None or merges is None:
        raise CheckpointError(_missing(directory, no_vocab=ids is None, no_merges=merges is None))
    _require_gpt2_cut(directory, settings, model_type)
    return _from_gpt2_files(directory, ids, merges, settings, special)


def _missing(directory: Path, *, no_vocab: bool, no_merges: bool) -> str:
    names = ["tokenizer.json"] + ["vocab.json"] * no_vocab + ["merges.txt"] * no_merges
    where = shown(directory) if os.path.isdir(directory) else f"{shown(directory)}, which is not a directory"
    unread = os.path.lexists(directory / "tokenizer.model")
    hint = (
        " (transformers makes one from tokenizer.model: AutoTokenizer.from_pretrained, then save_pretrained)"
        if unread
        else ""
    )
    return (
        f"no tokenizer: {', '.join(names)} not found in {where}; put tokenizer.json there{hint}, or vocab.json with "
        "merges.txt, or name a directory that has them; without a tokenizer the model still works on token ids"
    )


def _require_gpt2_cut(directory: Path, settings: Mapping[str, Any], model_type: object) -> None:
    """vocab.json and merges.txt do not say how text is cut into words; any way but GPT-2's gives wrong ids."""
    named = settings.get("tokenizer_class")
    if named in _GPT2_CLASSES or (named is None and model_type not in _OTHER_CUTS):
        return
    raise ConfigError(
        f"{directory} has the vocab.json and merges.txt of {shown(str(named or model_type))}, which may cut text into "
        "words differently from GPT-2: put its tokenizer.json there"
    )


def _from_tokenizer_json(
    path: Path, found: dict[str, Any], settings: Mapping[str, Any], later: list[dict[str, Any]]
) -> Vocabulary:
    model = found.get("model")
    if not isinstance(model, dict):
        raise_damaged(path, '"model" is missing or not an object')
    spelling = spelling_of(path, found, model)
    added = list(_added(path, found.get("added_tokens")))
    vocab = model["vocab"] if isinstance(model.get("vocab"), dict) else {}
    known = vocab | {token.content: token.id for token in added}
    more = [item for item in later if not isinstance(item.get("content"), str) or item["content"] not in known]
    added += _added(path.parent / "tokenizer_config.json", more)
    return build_vocabulary(
        path,
        model.get("vocab"),
        _merges(path, model.get("merges")),
        added,
        normalizer=found.get("normalizer"),
        pre_tokenizer=_cut(path, found, settings.get("add_prefix_space"), spelling),
        ignore_merges=model.get("ignore_merges") is True,
        post_processor=found.get("post_processor"),
        spelling=spelling,
        strips_space=spelling is SENTENCEPIECE and strips_space(found),
    )


def _cut(path: Path, found: dict[str, Any], prefix: object, spelling: Spelling) -> Any:
    """The pre_tokenizer, with tokenizer_config.json's add_prefix_space."""
    cut: Any = found.get("pre_tokenizer")
    if spelling is SENTENCEPIECE:
        if isinstance(prefix, bool) and prefix != adds_space(found):
            raise ConfigError(
                f"{path.parent / 'tokenizer_config.json'} has add_prefix_space {prefix}, but {path.name} says the "
                "opposite: make them agree"
            )
        return next(iter(parts(cut, "pretokenizers")), None)
    if isinstance(prefix, bool) and cut.get("type") == "ByteLevel":
        cut = {**cut, "add_prefix_space": prefix}
    return cut


def _merges(path: Path, merges: object) -> list[tuple[str, str]]:
    """Pairs, from either spelling: ["a", "b"] or "a b"."""
    if not isinstance(merges, list):
        raise_damaged(path, "its merges are not a list")
    pairs = []
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise_damaged(path, f"{quoted(merge)} is not a merge of two tokens")
        pairs.append((pair[0], pair[1]))
    return pairs


def _added(path: Path, items: object) -> Iterator[AddedToken]:
    """The tokens of "added_tokens", without empty ones, which no text contains."""
    if not isinstance(items, list | None):
        raise_damaged(path, "its added tokens are not a list")
    for item in items or []:
        if not isinstance(item, dict) or not isinstance(item.get("content"), str) or type(item.get("id")) is not int:
            raise_damaged(path, f"the added token {quoted(item)} has no content or no id")
        flags = {key: item.get(key) is True for key in ("special", "lstrip", "rstrip", "single_word")}
        normalized = item.get("normalized", not flags["special"]) is True
        flags["special"] = flags["special"] or _DEEPSEEK.fullmatch(item["content"]) is not None
        if item["content"]:
            yield AddedToken(item["content"], item["id"], normalized=normalized, **flags)


def _from_gpt2_files(
    directory: Path, ids: dict[str, Any], merges: str, settings: Mapping[str, Any], special: Mapping[str, Any]
) -> Vocabulary:
    path = directory / "merges.txt"
    lines = [line.removesuffix("\r") for line in merges.split("\n")]
    pairs = _merges(path, [line for line in lines if line and not line.startswith("#version")])
    built = {left + right for left, right in pairs}
    unbuilt = sum(len(token) > 1 and token not in built for token in ids)
    if unbuilt > _MOST_UNBUILT:
        raise_damaged(path, f"it is cut short, as no merge builds {unbuilt} of the tokens in vocab.json")
    added = list(_added(directory / "tokenizer_config.json", _gpt2_added(directory, ids, settings, special)))
    prefix = settings.get("add_prefix_space") is True
    return build_vocabulary(
        directory / "vocab.json",
        ids,
        pairs,
        added,
        pre_tokenizer={"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": True},
        post_processor=_gpt2_template(settings, special, {**ids, **{token.content: token.id for token in added}}),
    )


def _gpt2_added(
    directory: Path, ids: dict[str, Any], settings: Mapping[str, Any], special: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The added tokens, then those with a purpose; these get the next ids if vocab.json has none, as in transformers.

    <|endoftext|> is special even if no file says so, unless the files name other tokens for all three purposes.
    """
    items = read_additions(directory, settings, special)
    present = {item["content"]: item["id"] for item in items if isinstance(item.get("content"), str)}
    known = {**ids, **present}
    following = 1 + max((number for number in known.values() if type(number) is int), default=-1)
    unnamed = any(f"{which}_token" not in {**settings, **special} for which in ("bos", "eos", "unk"))
    default: dict[str, Mapping[str, Any]] = {END_OF_TEXT: {}} if END_OF_TEXT in ids and unnamed else {}
    for content, flags in (special_tokens(settings, special) | default).items():
        if content in present:
            continue
        if content not in known:
            known[content], following = following, following + 1
        items.append({**flags, "content": content, "id": known[content], "special": True})
    return items


def _gpt2_template(
    settings: Mapping[str, Any], special: Mapping[str, Any], known: Mapping[str, int]
) -> dict[str, Any] | None:
    """The post_processor that tokenizer_config.json's add_bos_token and add_eos_token imply."""
    names = {**settings, **special}

    def token(which: str) -> Token | None:
        value = names.get(f"{which}_token", END_OF_TEXT)
        content = value.get("content") if isinstance(value, dict) else value
        if settings.get(f"add_{which}_token") is not True or not isinstance(content, str):
            return None
        return (content, known[content]) if content in known else None

    return post_processor(token("bos"), token("eos"))
