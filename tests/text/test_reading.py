"""A tokenizer's files: every fault is an error that names the file, and every setting means what it should."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gptjax.errors import CheckpointError, ConfigError, RequestError
from gptjax.text import load_tokenizer
from tests.text.text_material import DEMO, GPT2, HARMONY, demo_json, with_added, write_json

Change = Callable[[dict[str, Any]], Any]


def test_nothing_there(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "absent", GPT2 / "vocab.json"):
        with pytest.raises(CheckpointError) as error:
            load_tokenizer(directory)
        for part in ("tokenizer.json", "vocab.json", "merges.txt", str(directory), "token ids"):
            assert part in str(error.value)


@pytest.mark.parametrize(("present", "missing"), [("vocab.json", "merges.txt"), ("merges.txt", "vocab.json")])
def test_half_of_the_gpt2_form(tmp_path: Path, present: str, missing: str) -> None:
    shutil.copy(GPT2 / present, tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(tmp_path)
    assert f"tokenizer.json, {missing} not found in {tmp_path}" in str(error.value)


DAMAGES = {
    "cut": b'{"model": {"type": "BPE", "vocab": {"a": 0',
    "empty": b"",
    "no UTF-8": b'{"a": "\xff"}',
    "a list": b"[1, 2]",
    "nested": b'{"a":' + b"[" * 200_000,
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "vocab.json", "config.json", "generation_config.json", "tokenizer_config.json"]
)
def test_damaged_json(tmp_path: Path, name: str, damage: bytes) -> None:
    for source in (GPT2 / "vocab.json", GPT2 / "merges.txt"):
        shutil.copy(source, tmp_path)
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(CheckpointError, match=name):
        load_tokenizer(tmp_path)


def test_git_lfs_pointer_names_the_cure(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "merges.txt"):
        shutil.rmtree(tmp_path)
        shutil.copytree(GPT2, tmp_path)
        (tmp_path / name).write_bytes(DAMAGES["a Git LFS pointer"])
        with pytest.raises(CheckpointError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
            load_tokenizer(tmp_path)


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "model",
    [
        models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"),
        models.Unigram([("a", -1.0)]),
        models.WordLevel({"a": 0}, unk_token="a"),
    ],
    ids=["WordPiece", "Unigram", "WordLevel"],
)
def test_other_models(tmp_path: Path, model: Any, request: pytest.FixtureRequest) -> None:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=rf"tokenizer\.json is not a byte-level BPE .*{request.node.callspec.id}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda file: file["model"].update(byte_fallback=True), "byte_fallback"),
        (lambda file: file["model"].update(end_of_word_suffix="</w>"), "</w>"),
        (lambda file: file["model"].update(continuing_subword_prefix="##"), "##"),
        (lambda file: file.update(pre_tokenizer={"type": "Whitespace"}), "pre_tokenizer is not ByteLevel"),
        (lambda file: file.pop("pre_tokenizer"), "pre_tokenizer is not ByteLevel"),
        (lambda file: file.update(decoder={"type": "Metaspace"}), "Metaspace"),
    ],
)
def test_bpe_of_another_kind(tmp_path: Path, change: Change, named: str) -> None:
    file = demo_json()
    change(file)
    with pytest.raises(ConfigError, match=named):
        load_tokenizer(write_json(tmp_path, "tokenizer.json", file))


def added(**entry: Any) -> Change:
    return lambda file: file["added_tokens"].append({"id": 8192, "content": "<x>", "special": True, **entry})


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.pop("model"),
        lambda file: file["model"].update(vocab=[]),
        lambda file: file["model"].update(vocab={}),
        lambda file: file["model"]["vocab"].update(zzz=5),
        lambda file: file["model"]["vocab"].update({"\ud800": 8500}),
        lambda file: file["model"].update(merges=None),
        lambda file: file["model"]["merges"].append(["zz", "q"]),
        lambda file: file["model"]["merges"].append(["Z", "Z"]),
        lambda file: file["model"].update(vocab={"a": 0, "b": 1}, merges=["a b"]),  # makes the library panic
        lambda file: file["model"]["merges"].append("a b c"),
        lambda file: file["model"]["merges"].append(["a"]),
        lambda file: file["model"]["merges"].append(["a", 1]),
        lambda file: file["model"]["merges"].append(7),
        lambda file: file.update(normalizer={"type": "Nonsense"}),
        lambda file: file.update(
            pre_tokenizer={
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
                    file["pre_tokenizer"],
                ],
            }
        ),
        lambda file: file.update(added_tokens={}),
        lambda file: file["added_tokens"].append("x"),
        added(content=None),
        added(id="8192"),
        added(id=-1),
        added(id=2**32),
        added(id=5),
        added(id=8191),
        added(content="<|endoftext|>"),
        added(content="\udc00"),
        added(content="the"),
    ],
)
def test_damaged_tokenizer_json(tmp_path: Path, change: Change) -> None:
    file = demo_json()
    change(file)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(write_json(tmp_path, "tokenizer.json", file))


@pytest.mark.parametrize("number", ["5", None, 1.0, True, -1, 2**32])
def test_impossible_ids(tmp_path: Path, number: Any) -> None:
    file = demo_json()
    file["model"]["vocab"]["zzz"] = number
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json is damaged: token 'zzz' has the id {number!r}"):
        load_tokenizer(write_json(tmp_path, "tokenizer.json", file))


def gpt2_files(directory: Path, merges: str | None = None, **settings: Any) -> Path:
    shutil.copy(GPT2 / "vocab.json", directory)
    text = (GPT2 / "merges.txt").read_text(encoding="utf-8") if merges is None else merges
    (directory / "merges.txt").write_bytes(text.encode())
    return write_json(directory, "tokenizer_config.json", settings)


def test_merges_cut_short(tmp_path: Path) -> None:
    text = (GPT2 / "merges.txt").read_text(encoding="utf-8")
    lines = text.split("\n")
    for cut in (text[: len(text) // 2], "\n".join(lines[:-500]) + "\n", "", "\n".join([*lines[:-1], "a"])):
        with pytest.raises(CheckpointError, match=r"merges\.txt is damaged"):
            load_tokenizer(gpt2_files(tmp_path, cut))


def test_merges_of_other_systems(tmp_path: Path) -> None:
    """With Windows line ends, without the header and with blank lines, they are the same merges."""
    text = (GPT2 / "merges.txt").read_text(encoding="utf-8").split("\n", 1)[1].replace("\n", "\r\n") + "\r\n\n"
    assert load_tokenizer(gpt2_files(tmp_path, text)).encode("Hello my name is") == [15496, 616, 1438, 318]


@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_gpt2_form_of_another_tokenizer(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}.*put its tokenizer.json there"):
        load_tokenizer(gpt2_files(tmp_path, tokenizer_class=name))


def test_gpt2_form_of_another_model(tmp_path: Path) -> None:
    gpt2_files(tmp_path)
    with pytest.raises(ConfigError, match="qwen2"):
        load_tokenizer(write_json(tmp_path, "config.json", {"model_type": "qwen2"}))
    assert load_tokenizer(write_json(tmp_path, "config.json", {"model_type": "gpt2"})).vocab_size == 50257


def test_later_tokens_of_the_gpt2_form(tmp_path: Path) -> None:
    later = {"50257": {"content": "<|pad|>", "special": True}, "50300": {"content": "<tool>", "special": False}}
    tokenizer = load_tokenizer(gpt2_files(tmp_path, added_tokens_decoder=later, tokenizer_class="GPT2Tokenizer"))
    assert dict(tokenizer.special_ids) == {"<|pad|>": 50257, "<|endoftext|>": 50256}
    assert tokenizer.encode("a<tool>", special=True) == tokenizer.encode("a<tool>") == [64, 50300]
    assert tokenizer.decode([64, 50257, 50300, 50256]) == "a<tool>"
    for wrong in ([1], {"x": {}}, {"1": 5}, {"1": {"special": True}}):
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json is damaged"):
            load_tokenizer(gpt2_files(tmp_path, added_tokens_decoder=wrong))


@pytest.mark.parametrize("form", ["tokenizer.json", "vocab.json"])
def test_add_prefix_space(tmp_path: Path, form: str) -> None:
    if form == "vocab.json":
        tokenizer = load_tokenizer(gpt2_files(tmp_path, add_prefix_space=True))
        assert tokenizer.encode("hello") == [23748] == tokenizer.encode(" hello")
    else:
        write_json(tmp_path, "tokenizer_config.json", {"add_prefix_space": True})
        tokenizer = load_tokenizer(write_json(tmp_path, "tokenizer.json", demo_json()))
        file = demo_json()
        file["pre_tokenizer"]["add_prefix_space"] = True
        theirs = tokenizers.Tokenizer.from_str(json.dumps(file))
        for text in ("hello", " hello", "a<|endoftext|>b<|endoftext|> c<|endoftext|>", "", "\n"):
            assert tokenizer.encode(text, special=True) == theirs.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode("") == []
    assert tokenizer.decode(tokenizer.encode("hello")) == " hello"


def test_settings_that_must_not_touch_ids(tmp_path: Path) -> None:
    plain = load_tokenizer(DEMO)
    file = demo_json()
    file["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    file["padding"] = {
        **{"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 8191, "pad_type_id": 0, "pad_token": "<|endoftext|>"},
    }
    file["model"]["dropout"] = 0.9
    file["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [8191], "tokens": ["<|endoftext|>"]}},
    }
    text = "Once upon a time there was a dragon who would not be shortened."
    assert load_tokenizer(write_json(tmp_path, "tokenizer.json", file)).encode(text) == plain.encode(text)


def test_ignore_merges(tmp_path: Path) -> None:
    """A word of the vocabulary that no merge builds is one token with it, and several without."""
    file = demo_json()
    file["model"]["vocab"]["zqxj"] = 8500
    load = lambda: load_tokenizer(write_json(tmp_path, "tokenizer.json", file))  # noqa: E731
    assert 8500 not in load().encode("zqxj")
    file["model"]["ignore_merges"] = True
    assert load().encode("zqxj") == [8500] == tokenizers.Tokenizer.from_str(json.dumps(file)).encode("zqxj").ids
    file["added_tokens"].append({"id": 8500, "content": "zqxj", "special": True})
    assert 8500 not in load().encode("zqxj")
    assert load().encode("zqxj", special=True) == [8500]


def test_special_token_that_text_is_made_of(tmp_path: Path) -> None:
    """Like "!" used as padding: hiding it would remove it from answers."""
    file = demo_json()
    for content in ("!", "the"):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        file["added_tokens"].append(
            {"id": file["model"]["vocab"][content], "content": content, "special": True, **flags}
        )
    tokenizer = load_tokenizer(write_json(tmp_path, "tokenizer.json", file))
    assert tokenizer.encode("the end!") == load_tokenizer(DEMO).encode("the end!")
    assert tokenizer.decode(tokenizer.encode("the end!")) == "the end!"
    assert list(tokenizer.special_ids) == ["<|endoftext|>"]
    library = tokenizers.Tokenizer.from_str(json.dumps(file))
    for text in ("the end!", "other!!the", "!"):
        found = tokenizer.encode(text, special=True)
        assert found == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(found) == text


def test_ids_are_the_files_even_with_gaps(tmp_path: Path) -> None:
    file = with_added(demo_json(), ["<a>", "<b>"])
    file["added_tokens"][-1]["id"] = 9000
    file["added_tokens"].append({"id": 9001, "content": "", "special": True})
    tokenizer = load_tokenizer(write_json(tmp_path, "tokenizer.json", file))
    assert tokenizer.encode("<a><b>", special=True) == [8192, 9000]
    assert tokenizer.decode([8192, 8193, 9000], special=True) == "<a><b>"
    assert tokenizer.vocab_size == 9001


def test_vocabulary_without_every_byte(tmp_path: Path) -> None:
    file = demo_json()
    file["model"].update(vocab={"a": 0, "b": 1, "ab": 2}, merges=["a b"])
    tokenizer = load_tokenizer(write_json(tmp_path, "tokenizer.json", file))
    assert tokenizer.encode("abba") == [2, 1, 0]
    with pytest.raises(RequestError, match=r"no token for the bytes b' \\xa9\\xc3'"):
        tokenizer.encode("ab é")


ENDS = [
    ("eos", [7, 8, 7], 9, "<|end|>", (7, 8)),
    ("eos", 7, 9, "<|end|>", (7,)),
    ("eos", None, 9, "<|end|>", (9,)),
    ("eos", ..., [9], "<|end|>", (9,)),
    ("eos", ..., None, "<|end|>", (8196,)),
    ("eos", ..., ..., {"content": "<|end|>", "lstrip": False}, (8196,)),
    ("eos", ..., [], None, ()),
    ("eos", ..., None, ..., ()),
    ("eos", ..., ..., ..., (8193, 8191, 8198)),  # <|return|>, <|endoftext|>, <|call|>
    ("bos", 5, 6, "<|end|>", 5),
    ("bos", ..., 6, "<|end|>", 6),
    ("bos", None, ..., "<|end|>", 8196),
    ("bos", ..., ..., None, None),
    ("bos", ..., ..., ..., 8192),  # <|startoftext|>
]


@pytest.mark.parametrize(("which", "generation", "config", "text", "expected"), ENDS)
def test_ends(tmp_path: Path, which: str, generation: Any, config: Any, text: Any, expected: Any) -> None:
    """`...` stands for a file without the key; null lets the next file speak."""
    write_json(tmp_path, "tokenizer.json", with_added(demo_json(), HARMONY))
    for name, key, value in (
        ("generation_config.json", f"{which}_token_id", generation),
        ("config.json", f"{which}_token_id", config),
        ("tokenizer_config.json", f"{which}_token", text),
    ):
        write_json(tmp_path, name, {} if value is ... else {key: value})
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.eos_ids if which == "eos" else tokenizer.bos_id) == expected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", {"eos_token_id": "5"}),
        ("generation_config.json", {"eos_token_id": [5, "6"]}),
        ("generation_config.json", {"eos_token_id": True}),
        ("config.json", {"eos_token_id": -1}),
        ("config.json", {"bos_token_id": [5, 6]}),
        ("config.json", {"bos_token_id": 1.5}),
        ("tokenizer_config.json", {"eos_token": "<|nonsense|>"}),
        ("tokenizer_config.json", {"bos_token": 5}),
    ],
)
def test_ends_that_make_no_sense(tmp_path: Path, name: str, content: dict[str, Any]) -> None:
    write_json(tmp_path, "tokenizer.json", demo_json())
    with pytest.raises(ConfigError, match=f"{name} has {next(iter(content))} ="):
        load_tokenizer(write_json(tmp_path, name, content))


@pytest.mark.parametrize(
    ("config", "settings", "length"),
    [
        ({"n_positions": 512, "n_ctx": 256}, {"model_max_length": 100}, 512),
        ({"max_position_embeddings": 131072, "initial_context_length": 4096}, {}, 131072),
        ({}, {"model_max_length": 1024}, 1024),
        ({"n_positions": "512"}, {"model_max_length": 1000000000000000019884624838656}, None),
        ({"n_positions": True, "unknown": {}}, {}, None),
    ],
)
def test_context_length(tmp_path: Path, config: dict[str, Any], settings: dict[str, Any], length: int | None) -> None:
    write_json(tmp_path, "tokenizer.json", demo_json())
    write_json(tmp_path, "config.json", config)
    assert load_tokenizer(write_json(tmp_path, "tokenizer_config.json", settings)).context_length == length
