"""OpenAI's original directory of GPT-OSS: its files, and a tokenizer that lies beside it or elsewhere."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

import convert
import gptjax
from gptjax.checkpoints import safetensors
from gptjax.cli import main
from gptjax.errors import CheckpointError
from gptjax.text import harmony
from tests.oracles import gpt_oss_random

FOLDER = "original"


@pytest.fixture
def repository(tmp_path, request):
    """A repository as it is published: its tokenizer, and a folder with the original files."""
    root = tmp_path / "repository"
    root.mkdir()
    demo = request.config.rootpath / "gptjax" / "demo" / "gpt-oss-tales"
    shutil.copyfile(demo / "tokenizer.json", root / "tokenizer.json")
    (root / "generation_config.json").write_text(json.dumps({"eos_token_id": [8193, 8192]}))
    checkpoint = gpt_oss_random.checkpoint(vocab_size=8256, **gpt_oss_random.TWO_LAYERS)
    tensors = gpt_oss_random.original_tensors(checkpoint.packed)
    gpt_oss_random.write_files(root / FOLDER, gpt_oss_random.original_config(checkpoint.config), tensors)
    return root


def test_the_tokenizer_beside_it_is_taken(repository):
    with gptjax.load(repository / FOLDER, max_length=128) as lm:
        assert harmony.missing_tokens(lm.tokenizer) == ()
        assert lm.eos_ids == (8193, 8192)
        assert lm.generate("The king", max_tokens=3).usage.prompt_tokens > 0


def test_one_of_its_own_goes_first(repository, demo):
    shutil.copyfile(demo / "tokenizer.json", repository / FOLDER / "tokenizer.json")
    with gptjax.load(repository / FOLDER, max_length=128) as lm:
        assert harmony.missing_tokens(lm.tokenizer)


def test_another_can_be_named(repository, demo, capsys):
    shutil.move(repository / FOLDER, repository.parent / "alone")
    alone = str(repository.parent / "alone")
    options = ["-m", alone, "--max-length", "128", "-n", "2"]
    assert main(["generate", "The king", *options]) == 1
    assert "no tokenizer" in capsys.readouterr().err
    assert main(["generate", "The king", *options, "--tokenizer", str(repository)]) == 0
    assert main(["chat", "The king", *options, "--tokenizer", str(repository)]) == 0
    assert main(["chat", "The king", *options, "--tokenizer", str(demo)]) == 1
    assert "gptjax generate" in capsys.readouterr().err


def test_converting_takes_the_tokenizer_along(repository, tmp_path):
    convert.convert(repository / FOLDER, tmp_path / "converted")
    with (
        gptjax.load(tmp_path / "converted", max_length=128) as converted,
        gptjax.load(repository / FOLDER, max_length=128) as own,
    ):
        assert converted.eos_ids == own.eos_ids
        np.testing.assert_array_equal(converted.logits([1, 2, 3]), own.logits([1, 2, 3]))


def test_files_that_number_themselves_need_no_index(repository):
    """As 120b's do: model--00001-of-00002.safetensors."""
    folder = repository / FOLDER
    whole = safetensors.open_directory(folder)
    tensors = {name: np.array(whole.read(name)) for name in whole.tensors}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    names = list(tensors)
    for number, part in enumerate((names[:9], names[9:]), 1):
        save_file({name: tensors[name] for name in part}, folder / f"model--0000{number}-of-00002.safetensors")
    assert set(safetensors.open_directory(folder).tensors) == set(tensors)
    shutil.copyfile(folder / "model--00002-of-00002.safetensors", folder / "model--00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="is in several files"):
        safetensors.open_directory(folder)
    (folder / "model--00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model--00001-of-00002\.safetensors of 2 files"):
        safetensors.open_directory(folder)
