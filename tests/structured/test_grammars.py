"""Regular expressions and Lark grammars, and how a matcher follows a text."""

import pickle
import re
import sys
from types import SimpleNamespace

import pytest

from gptjax.errors import RequestError
from gptjax.structured import Grammar, library, matching
from gptjax.structured.grammar import as_grammar
from tests.structured.walks import allowed, compiler, tokenizer, walk


@pytest.mark.parametrize(
    "pattern",
    ["(yes|no)", r"\d{3}-[a-f]{2}", "a/b", r"a\/b", r"[/\\]x", "line\nend", r"é{1,2}", r"\w{1,3}@\w{1,3}\.com"],
)
def test_a_text_matches_the_regular_expression(pattern):
    found = [walk(Grammar.of_regex(pattern), seed) for seed in range(8)]
    texts = [each.decode() for each in found if each is not None]
    assert texts
    for text in texts:
        assert re.fullmatch(pattern, text), text


def test_a_text_is_a_sentence_of_the_grammar():
    grammar = Grammar.of_lark('start: word ("," word)*\nword: /[ab]+/')
    for seed in range(10):
        text = walk(grammar, seed)
        assert text is None or re.fullmatch(rb"[ab]+(,[ab]+)*", text)


@pytest.mark.parametrize("pattern", ["a(", "(?=a)", r"(a)\1", "a" * 200_000, "\ud800", 3, None])
def test_a_regular_expression_that_cannot_be_compiled_is_refused(pattern):
    with pytest.raises(RequestError):
        Grammar.of_regex(pattern)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "start",
        "start: b",
        "begin: /a/",
        "start: " + "(" * 10_000,
        "start: start",
        "start: <|end|>",
        "start: /a(/",
        3,
    ],
)
def test_a_grammar_that_cannot_be_compiled_is_refused(text):
    with pytest.raises(RequestError, match=r"the grammar cannot be compiled|must be text"):
        Grammar.of_lark(text)


def test_what_callers_may_give():
    grammar = Grammar.of_json_object()
    assert as_grammar(grammar) is grammar
    assert as_grammar({"type": "object"}) == grammar
    assert as_grammar("start: /a/") == Grammar.of_lark("start: /a/")
    with pytest.raises(RequestError, match="JSON schema, a Lark grammar"):
        as_grammar(3)
    assert pickle.loads(pickle.dumps(grammar)) == grammar


def test_the_text_may_end_only_where_the_grammar_does():
    text = tokenizer()
    a, b = text.encode("a") + text.encode("b")
    ends = (*text.eos_ids, b)
    matcher = compiler().matcher(Grammar.of_regex("a{1,2}"), ends)
    assert not set(allowed(matcher)) & set(ends)
    matcher.take(a)
    assert set(allowed(matcher)) == {a, *ends}
    matcher.take(a)
    assert set(allowed(matcher)) == set(ends)
    matcher.take(b)
    assert matcher.is_over
    assert set(allowed(matcher)) == set(ends)


def test_a_matcher_goes_on_where_another_was():
    grammar, ids = Grammar.of_regex("abc"), tokenizer().encode("ab")
    first = compiler().matcher(grammar, ())
    for token_id in ids:
        first.take(token_id)
    assert allowed(first) == allowed(compiler().matcher(grammar, (), ids)) == tokenizer().encode("c")


def test_a_token_that_was_not_allowed_is_a_failure():
    matcher = compiler().matcher(Grammar.of_regex("a"), tokenizer().eos_ids, tokenizer().encode("b"))
    assert matcher.failure
    assert matcher.is_over
    assert allowed(matcher) == list(tokenizer().eos_ids)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    library.library.cache_clear()
    try:
        with pytest.raises(RequestError, match="'structured'"):
            Grammar.of_regex("a")
    finally:
        library.library.cache_clear()


def test_a_text_that_is_forced_has_tokens_whatever_the_tokenizer_does(monkeypatch):
    """llguidance allows only these where there is no choice. Llama's put a space before a text, and some raise."""
    text, grammar = tokenizer(), Grammar.of_regex(r'\{"a": "(b|c)"\}')
    usual = walk(grammar, 0)
    for encode in (lambda text, **_: tokenizer().encode(" " + text), _raise):
        vocabulary = matching._Vocabulary(text, text.vocab_size)
        monkeypatch.setattr(vocabulary, "_tokenizer", SimpleNamespace(encode=encode, longest_token=text.longest_token))
        for forced in (b'{"a": "', "é€".encode(), b"\xff", b""):
            ids = vocabulary(forced)
            assert b"".join(map(text.token_bytes, ids)) == forced
    assert usual in (b'{"a": "b"}', b'{"a": "c"}')


def _raise(text, **_):
    raise RequestError("no")
