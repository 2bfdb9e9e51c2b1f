"""docs/serving.md: what it lists is what there is."""

import re

import pytest

from gptjax.cli import _parser
from tests.server.server_material import DEMO, GPT_OSS, USER, make, post, samples

ROOT = DEMO.parents[1]
PAGE = (ROOT / "docs" / "serving.md").read_text()


def section(title: str) -> str:
    return re.split(r"^##+ ", PAGE.split(f"# {title}\n")[1], flags=re.M)[0]


def test_every_option_is_in_the_table():
    commands = next(action for action in _parser()._actions if action.dest == "command").choices
    known = {name for name in commands["serve"]._option_string_actions if name not in ("-h", "--help")}
    rows = [row for row in section("Start it").splitlines() if row.startswith("| `-")]
    assert {name for row in rows for name in re.findall(r"`(-[\w-]+)`", row.split("|")[1])} == known


def test_every_metric_is_in_the_table():
    names = {re.sub(r"_(bucket|count|sum)$", "", name) for name, *_ in metrics() if not name.endswith("_created")}
    assert set(re.findall(r"`((?:gptjax|worker)_\w+)`", section("Watch it"))) == names


def metrics():
    service = make(name=GPT_OSS)
    post(service, "/v1/completions", {"prompt": "a"})
    post(service, "/v1/completions", {})
    return samples(service)


def test_every_error_is_raised_somewhere():
    source = "\n".join(path.read_text() for path in (ROOT / "gptjax" / "server").rglob("*.py"))
    codes = {code for row in re.findall(r"^\| \d+ \|(.*?)\|", section("Errors"), flags=re.M) for code in row.split(",")}
    for code in {code.strip(" `") for code in codes} - {""}:
        assert f'"{code}"' in source, code


ROUTES = {"Completions": "completions", "Chat": "chat/completions", "Responses": "responses"}


@pytest.mark.parametrize("name", ROUTES)
def test_every_field_is_known(name):
    text = section("Ask it")
    common = re.search(r"All routes that generate take (.*?)\. ", text, flags=re.DOTALL)[1]
    own = re.search(rf"\*\*{name}\*\* also takes? (.*?)(?:\. |\.\n|\.$)", text, flags=re.DOTALL)[1]
    fields = re.findall(r"`(\w+)`", common + own)
    assert len(fields) > 18
    needed = {"completions": {"prompt": "a"}, "chat/completions": {"messages": [USER]}, "responses": {"input": "a"}}
    for field in fields:
        wrong = 3 if field == "guided_json" else {"surely": "wrong"}  # this is a schema, if a strange one
        body = {**needed[ROUTES[name]], field: wrong}
        answer = post(make(name=GPT_OSS), f"/v1/{ROUTES[name]}", body)
        assert answer.status_code == 400, field
        assert f"{field!r} is not a field" not in answer.json()["error"]["message"]
