"""`gptjax verify`: the demo gives its known answers, and a changed one does not."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import gptjax
from gptjax.checkpoints.checkpoint import open_checkpoint
from gptjax.cli import main
from gptjax.config import PUBLISHED
from gptjax.diagnostics import known_answers
from gptjax.diagnostics.perplexity import perplexity
from tests.oracles import o200k


def test_the_demo_gives_its_known_answers(lm):
    checks = known_answers.verify(lm)
    assert [check.name for check in checks] == ["vocabulary", "greedy tokens", "perplexity"]
    assert all(check.agrees for check in checks)


def test_the_known_answers_are_the_recorded_ones(request):
    """Of transformers, by the golden file; and the published GPT-2's by the order of its text."""
    golden = np.load(request.config.rootpath / "tests" / "data" / "golden" / "gpt2-tales.npz")
    known = known_answers._KNOWN["gpt2-tales"].greedy
    assert known.prompt_ids == tuple(golden["ids_0"].tolist())
    assert known.continuation == tuple(golden["greedy_0"].tolist())


def test_changed_weights_are_told(demo):
    sound = gptjax.load(demo, dtype="float32")
    params = jax.tree.map(lambda x: x * 1.05, sound.params)
    lm = gptjax.LanguageModel(
        sound.model, params, tokenizer=sound.tokenizer, defaults=sound.defaults, max_length=sound.max_length
    )
    assert [check.agrees for check in known_answers.verify(lm)][1:] != [True, True]


def test_the_published_vocabulary_is_recognised(request):
    folder = request.config.rootpath / "tests" / "data" / "gpt2_vocab"
    assert known_answers.VOCABULARIES[known_answers.fingerprint(gptjax.load_tokenizer(folder))] == "gpt2"
    assert set(known_answers.VOCABULARIES.values()) <= set(PUBLISHED) | {"gpt2-tales", "gpt-oss-tales"}


@pytest.mark.thorough
def test_the_published_vocabulary_of_gpt_oss_is_recognised(tmp_path):
    assert (
        known_answers.VOCABULARIES[known_answers.fingerprint(gptjax.load_tokenizer(o200k.write(tmp_path)))]
        == "gpt-oss-20b"
    )


@pytest.mark.thorough
def test_the_gpt_oss_demo_gives_its_known_answers(request):
    lm = gptjax.load("gpt-oss-tales", dtype="float32", max_length=2048)
    assert [(check.name, check.agrees) for check in known_answers.verify(lm)] == [
        ("vocabulary", True),
        ("greedy tokens", True),
        ("perplexity", True),
    ]
    golden = np.load(request.config.rootpath / "tests" / "data" / "golden" / "gpt-oss-tales.npz")
    known = known_answers._KNOWN["gpt-oss-tales"].greedy
    assert known.prompt_ids == tuple(golden["ids_0"].tolist())
    assert known.continuation == tuple(golden["greedy_0"].tolist())


def test_a_text_that_is_known_to_go_on(lm, monkeypatch):
    """The published GPT-OSS cannot be had here; the demo's own text stands in for theirs, right and wrong."""
    text = lm.generate("The king", max_tokens=9, temperature=0).text
    for continuation, agrees in ((text, True), (" is" + text, False)):
        continued = known_answers.Continued("The king", continuation)
        monkeypatch.setitem(known_answers._KNOWN, "gpt2-tales", known_answers.Known(continued=continued))
        assert [check.agrees for check in known_answers.verify(lm)] == [True, agrees]


def test_the_command(capsys):
    assert main(["verify"]) == 0
    assert capsys.readouterr().out.count("ok ") == 3
    assert main(["verify", "--json"]) == 0
    assert all(json.loads(line)["agrees"] for line in capsys.readouterr().out.splitlines())


def test_a_shortened_context_is_no_wrong_answer(demo):
    with pytest.raises(gptjax.RequestError, match="GPTJAX_MAX_LENGTH"):
        known_answers.verify(gptjax.load(demo, dtype="float32", max_length=64))


def test_other_sizes_with_a_known_vocabulary_are_unknown(demo, lm, monkeypatch):
    other = dataclasses.replace(open_checkpoint(demo), config=PUBLISHED["gpt2-xl"])
    monkeypatch.setattr(known_answers, "open_checkpoint", lambda name: other)
    assert known_answers.verify(lm) == []


def test_an_unknown_checkpoint_is_sent_to_compare(demo, tmp_path, capsys):
    shutil.copytree(demo, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    text = path.read_text()
    assert '"Ġking"' in text
    path.write_text(text.replace('"Ġking"', '"Ġkxng"').replace("Ġk ing", "Ġk xng"))
    status = main(["verify", str(tmp_path / "other")])
    err = capsys.readouterr().err
    assert status == 1
    assert "gptjax compare" in err or "tokenizer.json" in err


def test_perplexity_of_uniform_logits_is_the_vocabulary(lm, monkeypatch):
    monkeypatch.setattr(type(lm), "logits", lambda self, ids: np.zeros((len(ids), 50), np.float32))
    found = perplexity(lm, list(range(40)))
    assert found.value == pytest.approx(50)
    assert found.num_tokens == 39
    assert found.standard_error == pytest.approx(0, abs=1e-9)


def test_perplexity_needs_two_tokens(lm):
    with pytest.raises(gptjax.RequestError, match="two tokens"):
        perplexity(lm, [1])
