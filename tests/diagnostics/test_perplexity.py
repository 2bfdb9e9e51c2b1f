"""Perplexity: windows, strides and what is counted, against sums written out; and its command."""

import json
import re
import shutil

import numpy as np
import pytest

import gptjax
from gptjax.checkpoints.checkpoint import open_checkpoint
from gptjax.cli import main
from gptjax.diagnostics import perplexity as measuring
from gptjax.diagnostics.perplexity import Perplexity, perplexity, predict, windows


@pytest.fixture(scope="module")
def short(demo):
    """The demo with windows of 24 tokens."""
    return gptjax.load(demo, dtype="float32", max_length=24)


@pytest.fixture(scope="module")
def ids(lm):
    return lm.tokenizer.encode(measuring.HELD_OUT.read_text(encoding="utf-8"))[:120]


def _losses(lm, ids) -> np.ndarray:
    """Of every token but the first, by a softmax of all logits."""
    logits_TV = lm.logits(ids).astype(np.float64)
    logprobs_TV = logits_TV - np.logaddexp.reduce(logits_TV, axis=-1, keepdims=True)
    return np.array([-logprobs_TV[place, token] for place, token in enumerate(ids[1:])])


@pytest.mark.parametrize("length", [0, 1, 2, 10, 11, 24, 25, 73])
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (7, 1), (7, 3), (7, 7), (24, 1), (24, 7), (24, 23), (24, 24)])
def test_each_token_is_counted_in_one_window(length, size, stride):
    counted: list[int] = []
    for start, end, first in windows(length, size, stride):
        assert start <= first < end <= start + size
        assert start == 0 or first - start >= size - stride  # what stands before the first token that counts
        counted += range(first, end)
    assert counted == list(range(length))


@pytest.mark.parametrize("stride", [24, 11, 5])
def test_windows_written_out(short, ids, stride):
    """As in Hugging Face's guide: the last of each window's tokens, those that no window before it had."""
    expected, before = [], 0
    for start in range(0, len(ids), stride):
        end = min(start + 24, len(ids))
        expected += list(_losses(short, ids[start:end])[-(end - before) :])
        before = end
        if end == len(ids):
            break
    found = predict(short, ids, stride=stride)
    np.testing.assert_allclose(found.losses, expected, rtol=1e-12, atol=1e-12)
    assert len(found.losses) == len(ids) - (5 if stride == 24 else 1)  # 120 tokens are 5 windows of 24


def test_the_best_tokens_are_those_of_the_logits(short, ids):
    found = predict(short, ids[:24])
    np.testing.assert_array_equal(found.best, short.logits(ids[:24]).argmax(axis=-1)[:-1])


def test_a_whole_window_is_the_default(short, ids):
    assert perplexity(short, ids) == perplexity(short, ids, stride=24)
    found, losses = perplexity(short, ids[:20]), _losses(short, ids[:20])
    assert found.num_tokens == 19
    assert found.value == pytest.approx(np.exp(losses.mean()), rel=1e-12)
    assert found.standard_error == pytest.approx(found.value * losses.std() / np.sqrt(19), rel=1e-12)


def test_more_context_predicts_better(short, ids):
    assert perplexity(short, ids, stride=4).value < perplexity(short, ids).value


def test_a_last_window_of_one_token_predicts_nothing(short, ids):
    assert perplexity(short, ids[:25]) == perplexity(short, ids[:24])
    assert perplexity(short, ids[:25], stride=23).num_tokens == 24


def test_many_rows_of_logits_are_looked_at_a_few_at_a_time(short, ids, monkeypatch):
    expected = predict(short, ids)
    monkeypatch.setattr(measuring, "_NUMBERS", 3 * 8192)
    found = predict(short, ids)
    np.testing.assert_array_equal(found.losses, expected.losses)
    np.testing.assert_array_equal(found.best, expected.best)


def test_windows_are_told_of(short, ids):
    told: list[int] = []
    predict(short, ids[:60], stride=12, advance=told.append)
    assert told == [24, 24, 24, 24]


@pytest.mark.parametrize("stride", [0, -1, 25, 1.5, True])
def test_strides_out_of_range(short, ids, stride):
    with pytest.raises(gptjax.RequestError, match="from 1 to the window of 24 tokens"):
        perplexity(short, ids, stride=stride)


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_tokens(short, count):
    with pytest.raises(gptjax.RequestError, match="two tokens"):
        perplexity(short, [5] * count)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite(short, ids, monkeypatch, value):
    monkeypatch.setattr(type(short), "logits", lambda self, ids: np.full((len(ids), 50), value, np.float32))
    with pytest.raises(gptjax.RequestError, match="not finite"):
        perplexity(short, ids)


def test_the_window_of_a_long_context(monkeypatch):
    assert measuring.window(open_checkpoint("gpt-oss-tales").config, None) == 2048
    assert measuring.window(open_checkpoint("gpt-oss-tales").config, 5000) == 5000
    assert measuring.window(open_checkpoint("gpt2-tales").config, None) == 512
    monkeypatch.setenv("GPTJAX_MAX_LENGTH", "3000")
    assert measuring.window(open_checkpoint("gpt-oss-tales").config, None) == 3000
    with pytest.raises(gptjax.CapacityError):
        measuring.window(open_checkpoint("gpt2-tales").config, None)


# The command


def _run(capsys, *argv: str) -> tuple[int, str, str]:
    status = main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "The king's daughter was so fair that the sun itself, which has seen so much, wondered at her. " * 3
    )
    return str(path)


def test_the_command(capsys, short, text):
    status, out, err = _run(capsys, "perplexity", "--text", text, "--max-length", "24", "--stride", "6")
    with open(text, encoding="utf-8") as file:
        expected = perplexity(short, short.tokenizer.encode(file.read()), stride=6)
    assert (status, err) == (0, "")
    assert out.startswith(f"perplexity {expected.value:.2f} ± {expected.standard_error:.2f} on {expected.num_tokens} ")
    assert re.search(r"\(windows of 24, stride 6\), \d+ tokens/s\n$", out)


def test_json(capsys, short, text):
    status, out, _ = _run(capsys, "perplexity", "gpt2-tales", "--text", text, "--max-length", "24", "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts.pop("tokens_per_second") > 0
    assert Perplexity(facts.pop("perplexity"), facts.pop("standard_error"), facts.pop("tokens")).value > 1
    assert facts == {"model": "gpt2-tales", "text": text, "max_length": 24, "stride": 24}


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--text", "/no/such/text"], "/no/such/text cannot be read (No such file"),
        (["--text", "."], "cannot be read"),
        (["--text", "\0"], "cannot be a file"),
        (["--stride", "513"], "from 1 to the window of 512"),
        (["--stride", "0"], "found 0"),
        (["--max-length", "513"], "512 positions"),
        (["--max-length", "1"], "two tokens"),
        (["no-such-model"], "no-such-model"),
    ],
)
def test_errors(capsys, argv, says):
    status, out, err = _run(capsys, "perplexity", *argv)
    assert (status, out) == (1, "")
    assert says in err


def test_text_must_be_utf8_and_a_tokenizer_be_there(capsys, demo, tmp_path):
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    assert "not UTF-8" in _run(capsys, "perplexity", "--text", str(tmp_path / "latin.txt"))[2]
    (tmp_path / "empty.txt").write_text("")
    assert "two tokens" in _run(capsys, "perplexity", "--text", str(tmp_path / "empty.txt"))[2]
    shutil.copytree(demo, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    assert "tokenizer" in _run(capsys, "perplexity", str(tmp_path / "mute"))[2]
