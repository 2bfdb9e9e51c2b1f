"""Tokenizers from GGUF metadata: what its values mean, and every wrong one is an error that names its key."""

import copy
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from gptjax.errors import CheckpointError, ConfigError, RequestError
from gptjax.text import Tokenizer, tokenizer_from_gguf
from tests.fuzz import rounds

LETTERS = ["a", "b", "c", "Ġ"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
Change = Callable[[dict[str, Any]], Any]


def key(name: str) -> str:
    return f"tokenizer.ggml.{name}"


def gpt2(*more: tuple[str, int], **values: Any) -> dict[str, Any]:
    """A byte-level BPE of four letters, two merges, <s> (id 6) and `more` tokens with their types."""
    tokens = [(letter, NORMAL) for letter in [*LETTERS, "ab", "Ġab"]] + [("<s>", CONTROL), *more]
    return {
        "general.architecture": "qwen2",
        "qwen2.context_length": 77,
        key("model"): "gpt2",
        key("pre"): "gpt-2",
        key("tokens"): [token for token, _ in tokens],
        key("token_type"): [kind for _, kind in tokens],
        key("merges"): ["a b", "Ġ ab"],
        **{key(name): value for name, value in values.items()},
    }


def llama(*more: tuple[str, int], **values: Any) -> dict[str, Any]:
    """A SentencePiece BPE: <unk>, <s>, </s>, the bytes, and from id 259 on some pieces, the better ones first."""
    pieces = ["ab", "▁ab", "abc", "▁▁", "▁", "a", "b", "c"]
    tokens = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL), *((byte, BYTE) for byte in BYTES)]
    tokens += [(piece, NORMAL) for piece in pieces] + list(more)
    return {
        "general.architecture": "llama",
        key("model"): "llama",
        key("tokens"): [token for token, _ in tokens],
        key("token_type"): [kind for _, kind in tokens],
        key("scores"): [0.0] * 259 + [float(-n) for n in range(len(tokens) - 259)],
        **{key(name): value for name, value in values.items()},
    }


def load(metadata: dict[str, Any]) -> Tokenizer:
    return tokenizer_from_gguf(metadata, "model.gguf")


def test_attributes_of_a_byte_level_bpe() -> None:
    tokenizer = load(gpt2(bos_token_id=6, eos_token_id=6) | {"tokenizer.chat_template": "{{ x }}"})
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.longest_token) == ("byte-level-bpe", 7, 3)
    assert (tokenizer.bos_id, tokenizer.eos_ids, dict(tokenizer.special_ids)) == (6, (6,), {"<s>": 6})
    assert (tokenizer.context_length, tokenizer.chat_template) == (77, "{{ x }}")
    assert tokenizer.encode("ab abc") == [4, 5, 2]


def test_attributes_of_a_sentencepiece_bpe() -> None:
    tokenizer = load(llama())
    assert (tokenizer.kind, tokenizer.vocab_size) == ("sentencepiece-bpe", 267)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))  # llama.cpp's defaults
    assert dict(tokenizer.special_ids) == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert (tokenizer.context_length, tokenizer.chat_template) == (None, None)
    assert tokenizer.encode("ab abc é") == [260, 260, 266, 263, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(tokenizer.encode("ab abc é<s>")) == "ab abc é<s>"


@pytest.mark.parametrize("metadata", [gpt2, llama])
def test_no_ids_no_ends(metadata: Callable[..., dict[str, Any]]) -> None:
    values = metadata()
    values[key("token_type")] = [USER_DEFINED if kind == CONTROL else kind for kind in values[key("token_type")]]
    tokenizer = load(values)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, ())
    assert tokenizer.prompt("ab") == tokenizer.encode("ab")


@pytest.mark.parametrize(
    ("metadata", "before", "after"),
    [
        (gpt2(bos_token_id=6), [], []),
        (gpt2(bos_token_id=6, add_bos_token=True), [6], []),
        (gpt2(bos_token_id=6, pre="llama-bpe"), [6], []),
        (gpt2(bos_token_id=6, pre="llama-bpe", add_bos_token=False), [], []),
        (gpt2(pre="llama-bpe"), [], []),
        (gpt2(eos_token_id=6, add_eos_token=True), [], [6]),
        (llama(), [1], []),
        (llama(add_bos_token=False), [], []),
        (llama(add_eos_token=True, eos_token_id=0, bos_token_id=2), [2], [0]),
    ],
)
def test_tokens_around_a_prompt(metadata: dict[str, Any], before: list[int], after: list[int]) -> None:
    tokenizer = load(metadata)
    assert tokenizer.prompt("ab") == [*before, *tokenizer.encode("ab"), *after]


@pytest.mark.parametrize(
    ("more", "ids", "ends"),
    [
        ([], {"eos_token_id": 6}, (6,)),
        ([("<|eot_id|>", CONTROL), ("<|eom_id|>", CONTROL), ("<|x|>", CONTROL)], {"eos_token_id": 6}, (6, 7, 8)),
        ([("<|x|>", CONTROL), ("<|y|>", CONTROL)], {"eot_token_id": 8, "eom_token_id": 7}, (8, 7)),
        ([("<|im_end|>", USER_DEFINED), ("<|endoftext|>", CONTROL)], {"eos_token_id": 7}, (7, 8)),
        ([("<end_of_turn>", NORMAL)], {}, (7,)),
        ([("<|eot_id|>", UNUSED)], {}, ()),
        ([("<|end|>", CONTROL)], {}, (7,)),
        ([("<|end|>", CONTROL), ("<|return|>", CONTROL), ("<|call|>", CONTROL)], {"eos_token_id": 8}, (8, 9)),
        ([("<|end|>", CONTROL), ("<|return|>", CONTROL), ("<|call|>", CONTROL)], {"eot_token_id": 7}, (8, 9)),
    ],
)
def test_ends(more: list[tuple[str, int]], ids: dict[str, int], ends: tuple[int, ...]) -> None:
    tokenizer = load(gpt2(*more, **ids))
    assert tokenizer.eos_ids == ends
    assert all(number in tokenizer.special_ids.values() for number in ends)


@pytest.mark.parametrize("metadata", [gpt2, llama])
def test_types(metadata: Callable[..., dict[str, Any]]) -> None:
    """Control tokens are special; user-defined ones are matched in any text; unused ones are not there."""
    tokenizer = load(metadata(("ccc", CONTROL), ("cab", USER_DEFINED), ("[PAD9]", UNUSED), ("", UNUSED)))
    first = len(metadata()[key("tokens")])
    assert tokenizer.encode("ccc", special=True) == [first]
    assert tokenizer.decode(tokenizer.encode("ccc")) == "ccc"
    assert tokenizer.encode("cab") == [first + 1]
    assert tokenizer.decode([first, first + 1, first + 2, first + 3]) == "cab"
    assert tokenizer.decode([first, first + 1, first + 2, first + 3], special=True) == "ccccab"
    assert tokenizer.vocab_size == first + 2


@pytest.mark.parametrize("metadata", [gpt2, llama])
def test_empty_tokens_may_repeat(metadata: Callable[..., dict[str, Any]]) -> None:
    assert load(metadata(("", UNUSED), ("", NORMAL))).encode("ab")


def test_prefix_space() -> None:
    assert load(llama(add_space_prefix=False)).encode("ab") == [259]
    assert load(llama(add_space_prefix=True)).encode("ab") == [260]
    assert load(llama(add_space_prefix=False)).decode([260]) == " ab"
    assert load(llama()).decode([260, 260]) == "ab ab"
    assert load(gpt2(add_space_prefix=True)).encode("ab") == [5]
    with pytest.raises(ConfigError, match=r"tokenizer\.ggml\.add_space_prefix true"):
        load(gpt2(add_space_prefix=True, pre="qwen2"))


def test_user_defined_spaces() -> None:
    """As llama.cpp, and Hugging Face's Prepend: what follows such a token begins with a space."""
    tokenizer = load(llama(("<|x|>", CONTROL)))
    assert tokenizer.encode("ab<|x|>ab", special=True) == [260, 267, 260]
    assert tokenizer.decode([260, 267, 260]) == "ab ab"


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        (gpt2(model="bert"), "model 'bert'"),
        (gpt2(pre="default"), "pre 'default'; gptjax knows deepseek-coder, .*, tekken"),
        (gpt2(pre="no-such"), "pre 'no-such'; gptjax knows"),
        ({name: value for name, value in gpt2().items() if name != key("pre")}, r"no tokenizer\.ggml\.pre"),
        (gpt2(precompiled_charsmap=[1]), "precompiled_charsmap"),
        (gpt2(add_sep_token=True), "add_sep_token true"),
        (gpt2(("<0x00>", BYTE)), "token_type 6"),
        (llama(scores=[-1.0] * 267), "scores that give '.*' and '.*' the same score"),
    ],
)
def test_unsupported(metadata: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.gguf has (tokenizer\.ggml\.)?.*{named}"):
        load(metadata)


def test_runs_of_a_character_may_have_equal_scores() -> None:
    """As Llama 2's runs of spaces: the leftmost two are joined first."""
    metadata = llama(("▁▁▁", NORMAL))
    metadata[key("scores")] = [
        -1.0 if set(token) == {"▁"} else 0.0 - n for n, token in enumerate(metadata[key("tokens")])
    ]
    assert load(metadata).encode(" " * 6) == [267, 267, 263]


HOSTILE: list[tuple[str, dict[str, Any]]] = [
    ("model", gpt2(model=5)),
    ("pre", gpt2(pre=["gpt-2"])),
    ("tokens", gpt2(tokens="abc")),
    ("tokens", gpt2(tokens=[])),
    ("tokens", gpt2(tokens=[1, 2, 3])),
    ("tokens", gpt2(tokens=[b"a"])),
    ("tokens", gpt2(tokens=["x" * 5000])),
    ("tokens", gpt2(("\ud800", NORMAL))),
    ("tokens", gpt2(("a", NORMAL))),
    ("tokens", gpt2(("<s>", CONTROL))),
    ("tokens", gpt2(tokens=["a"] * 10_000_000)),
    ("token_type", gpt2(token_type=None)),
    ("token_type", gpt2(token_type=[1])),
    ("token_type", gpt2(token_type=[1] * 1_000)),
    ("token_type", gpt2(token_type=[True] * 7)),
    ("token_type", gpt2(token_type=[0] * 7)),
    ("token_type", gpt2(token_type=[9] * 7)),
    ("token_type", gpt2(token_type=[1.0] * 7)),
    ("merges", gpt2(merges=None)),
    ("merges", gpt2(merges=[["a", "b"]])),
    ("merges", gpt2(merges=["ab"])),
    ("merges", gpt2(merges=[""])),
    ("merges", gpt2(merges=["a z"])),
    ("merges", gpt2(merges=["b a"])),
    ("merges", gpt2(merges=["a b c"])),
    ("merges", gpt2(merges=["a b"] * (1 << 23))),
    ("bos_token_id", gpt2(bos_token_id=7)),
    ("eos_token_id", gpt2(eos_token_id=-1)),
    ("eot_token_id", gpt2(eot_token_id="6")),
    ("eom_token_id", gpt2(eom_token_id=True)),
    ("unknown_token_id", gpt2(unknown_token_id=2**40)),
    ("padding_token_id", gpt2(padding_token_id=6.0)),
    ("fim_pad_token_id", gpt2(fim_pad_token_id=99)),
    ("bos_token_id", gpt2(add_bos_token=True)),
    ("add_bos_token", gpt2(add_bos_token=1)),
    ("add_eos_token", llama(add_eos_token="yes")),
    ("eos_token_id", gpt2(add_eos_token=True)),
    ("add_space_prefix", llama(add_space_prefix=0)),
    ("remove_extra_whitespaces", llama(remove_extra_whitespaces=None)),
    ("scores", {name: value for name, value in llama().items() if name != key("scores")}),
    ("scores", llama(scores=[0.0])),
    ("scores", llama(scores=[float("nan")] * 267)),
    ("scores", llama(scores=[float("inf")] * 267)),
    ("scores", llama(scores=[False] * 267)),
    ("tokens", llama(token_type=[NORMAL] * 267)),
    ("tokens", llama(("<0x0a>", BYTE))),
    ("tokens", llama(*(("d" * n, NORMAL) for n in range(1, 1_024)))),
]


@pytest.mark.parametrize(("name", "metadata"), HOSTILE, ids=[f"{n} {name}" for n, (name, _) in enumerate(HOSTILE)])
def test_hostile_values(name: str, metadata: dict[str, Any]) -> None:
    start = time.thread_time()
    with pytest.raises(CheckpointError, match=rf"model\.gguf is damaged: tokenizer\.ggml\.{name} ") as error:
        load(metadata)
    assert time.thread_time() - start < 1
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("metadata", [{}, {"general.architecture": "llama", "llama.context_length": 77}])
def test_a_file_without_a_tokenizer_is_not_damaged(metadata: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"^no tokenizer: model\.gguf has no tokenizer\.ggml\.model; .*ids$"):
        load(metadata)


@pytest.mark.parametrize("wrong", [5, ["a"], b"x"])
def test_damaged_chat_template(wrong: Any) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.chat_template is"):
        load(gpt2() | {"tokenizer.chat_template": wrong})


@pytest.mark.fuzz
def test_mutations_raise_only_the_named_errors() -> None:
    pick = random.Random(5)
    values = [
        None,
        True,
        0,
        -1,
        7,
        2**63,
        0.5,
        float("nan"),
        "",
        "a",
        "a b",
        "llama",
        "gpt2",
        "\ud800",
        [],
        {},
        "▁" * 999,
    ]
    for _ in range(rounds(10_000)):
        metadata = copy.deepcopy(pick.choice([gpt2, llama])(*pick.choices([("<x>", 3), ("", 5), ("é", 4), ("ba", 1)])))
        for _ in range(pick.randint(1, 3)):
            name, value = pick.choice(list(metadata)), pick.choice(values)
            if isinstance(metadata[name], list) and metadata[name] and pick.random() < 0.8:
                metadata[name][pick.randrange(len(metadata[name]))] = value
            else:
                metadata[name] = value
        try:
            tokenizer = load(metadata)
            tokenizer.decode(tokenizer.prompt("ab abc", special=True))
        except (CheckpointError, ConfigError) as error:
            assert "model.gguf" in str(error)
        except RequestError as error:  # the vocabulary has lost a letter
            assert "no token for the bytes" in str(error)
