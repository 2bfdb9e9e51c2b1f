"""Where a tokenizer can be: a directory, converted or not, and a GGUF file."""

import pytest

import convert
from gptjax.checkpoints.text_files import tokenizer_at
from gptjax.errors import CheckpointError, ConfigError
from tests.gguf import made
from tests.oracles import gguf_from_hf, llama_random

FORMS = ["a GGUF file", "a GGUF file under another name", "a part of a set", "a converted directory", "an exported one"]


def _write(base, form):
    model = llama_random.checkpoint(3)
    name = "model.ckpt" if form.endswith("another name") else "model.gguf"
    path = gguf_from_hf.write(base / name, *model, metadata=made.tokenizer())
    if form == "a part of a set":
        parts = [base / f"model-{number:05}-of-00002.gguf" for number in (1, 2)]
        for number, part in enumerate(parts):
            split = {"split.no": number, "split.count": 2, "split.tensors.count": 0}
            metadata = {key: made.number(made.U16, value) for key, value in split.items()}
            part.write_bytes(made.file(metadata | ({} if number else made.tokenizer())))
        return parts[1]
    if form == "a converted directory":
        return convert.convert(path, base / "converted").destination
    return convert.export(path, base / "exported").destination if form == "an exported one" else path


@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path, form):
    tokenizer = tokenizer_at(_write(tmp_path, form))
    assert tokenizer.encode("abba") == [2, 1, 0]
    assert dict(tokenizer.special_ids) == {"<s>": 3}


def test_a_directory_of_hugging_face(demo):
    assert tokenizer_at(str(demo)).eos_ids == (8191,)


def test_others_are_errors(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not a GGUF file; name one, or the directory"):
        tokenizer_at(tmp_path / "tokenizer.json")
    (tmp_path / "x.gguf").write_bytes(made.file())
    with pytest.raises(CheckpointError, match="no tokenizer: "):
        tokenizer_at(tmp_path / "x.gguf")
    (tmp_path / "y.gguf").write_bytes(made.file(made.tokenizer(pre=made.string("dbrx"))))
    with pytest.raises(ConfigError, match="'dbrx'"):
        tokenizer_at(tmp_path / "y.gguf")
    with pytest.raises(CheckpointError, match=r"not found in .*absent, which is not a directory"):
        tokenizer_at(tmp_path / "absent")
