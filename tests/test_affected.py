"""`make affected`: which tests a change can reach."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import affected as tool
from tests.import_graph import PACKAGES, ROOT, modules
from tests.thinned import thorough


def _arrows() -> dict[str, set[str]]:
    return tool.graph(frozenset())


def _affected(*changed: str) -> list[str]:
    return tool.affected(map(Path, changed), _arrows())


def _reached(module: str) -> set[str]:
    found, waiting = {module}, [module]
    while waiting:
        new = _arrows()[waiting.pop()] - found
        found |= new
        waiting += new
    return found


@pytest.mark.parametrize(
    ("changed", "reaches", "spares"),
    [
        ("gptjax/layers/norm.py", ["models.test_gpt2", "engine.test_engine", "test_api"], ["text.test_tokenizer"]),
        ("gptjax/text/tokenizer.py", ["text.test_tokenizer", "test_chat"], ["pallas_kernels.moe.test_moe"]),
        ("gptjax/server/front/app.py", ["server.test_app"], ["models.test_gpt2", "engine.test_engine", "test_api"]),
        (
            "pallas_kernels/attention/decode/mosaic_sm90.py",
            ["pallas_kernels.attention.decode.test_decode_over_pages", "test_api"],
            ["text.test_tokenizer"],
        ),
        # The fixture `lm` of tests/conftest.py, whose users need not import a thing; code in a string; `-m gptjax`.
        ("gptjax/language_model.py", ["test_api", "test_docs", "test_fork", "cli.test_cli"], ["models.test_gpt2"]),
        ("gptjax/__main__.py", ["cli.test_cli", "server.test_load"], ["test_api"]),
        # `from gptjax.diagnostics import info, perplexity` in a string.
        ("gptjax/diagnostics/info.py", ["checkpoints.test_special_files"], []),
        (
            "convert/mxfp4.py",
            ["convert.test_convert_mxfp4"],
            ["pallas_kernels.attention.test_attention", "text.test_tokenizer"],
        ),
        # Material of the tests.
        ("tests/fuzz.py", ["server.test_malformed", "text.test_added_tokens"], ["test_api", "server.test_app"]),
        ("tests/oracles/moe_numpy.py", ["pallas_kernels.moe.test_moe"], ["pallas_kernels.attention.test_attention"]),
        ("tests/text/conftest.py", ["text.test_tokenizer"], ["server.test_app", "test_chat"]),
        ("tests/test_api.py", ["test_api"], ["test_docs"]),
        # What is not Python: data of a package, pages, data of the tests.
        ("gptjax/server/front/static/page.html", ["server.test_page"], ["text.test_tokenizer"]),
        ("docs/serving.md", ["test_docs"], ["test_api"]),
        ("tests/data/held-out.txt", ["models.test_precision"], ["server.test_app"]),
        ("LICENSE", [], ["test_api", "test_docs", "server.test_app"]),
    ],
)
def test_a_change_affects_what_reaches_it(changed, reaches, spares):
    found = _affected(changed)
    assert {f"tests.{name}" for name in reaches} <= set(found)
    assert not {f"tests.{name}" for name in spares} & set(found)


@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt", "tests/conftest.py"])
def test_what_all_tests_run_by_affects_all(changed):
    assert set(_affected(changed)) == {name for name in _arrows() if name.rpartition(".")[2].startswith("test_")}


def test_the_nearest_come_first():
    found = _affected("gptjax/layers/norm.py")
    assert (
        found.index("tests.models.test_gpt2") < found.index("tests.engine.test_engine") < found.index("tests.test_api")
    )
    assert _affected("tests/test_api.py", "gptjax/layers/norm.py")[0] == "tests.test_api"


def test_a_module_that_is_gone_affects_those_that_still_import_it():
    # This file names it in a string, as one that patches it would.
    assert tool.affected([Path("gptjax/support/gone.py")], tool.graph(frozenset({"gptjax.support.gone"}))) == [
        "tests.test_affected"
    ]


@pytest.mark.parametrize(
    ("changed", "printed", "targets"),
    [
        ("tests/oracle/test_compare.py", [], ["oracle"]),
        ("tests/server/test_load.py", [], ["slow"]),
        ("tests/server/test_load_speeds.py", [], ["quiet"]),
        (
            "tests/oracles/harmony_cases.py",
            ["tests/text/test_harmony_parsing.py", "tests/text/test_harmony_rendering.py"],
            ["oracle"],
        ),
    ],
)
def test_what_a_target_of_its_own_runs_is_named_apart(monkeypatch, capsys, changed, printed, targets):
    """pytest would select nothing in it, and fail."""
    monkeypatch.setattr(tool, "changed_files", lambda base: [Path(changed)])
    tool.main()
    out, err = capsys.readouterr()
    assert out.splitlines() == printed
    assert err.splitlines() == [f"make {target} reaches this change, too" for target in targets]


@pytest.mark.parametrize(
    "test", ["tests.text.test_tokenizer", "tests.server.test_app", thorough("tests.engine.test_engine")]
)
def test_all_that_python_imports_is_in_the_graph(test):
    code = f"import sys, {test}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split()) & set(modules(*PACKAGES, "tests"))
    assert loaded - _reached(test) == set()


def test_changes_are_those_since_the_branch_left_main_and_what_is_not_committed(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "ROOT", tmp_path)

    def git(*arguments: str) -> None:
        name = ["-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *name, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-b", "main")
    for name in ("kept.py", "committed.py", "changed.py", "gone.py", "ignored.py"):
        (tmp_path / name).write_text("1")
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    git("add", ".")
    git("commit", "-m", "first")
    assert tool.changed_files(None) == []
    git("checkout", "-b", "branch")
    (tmp_path / "committed.py").write_text("2")
    git("commit", "-am", "second")
    (tmp_path / "changed.py").write_text("2")
    (tmp_path / "gone.py").unlink()
    (tmp_path / "new ä.py").write_text("1")
    (tmp_path / "ignored.py").write_text("2")
    assert [str(path) for path in tool.changed_files(None)] == ["changed.py", "committed.py", "gone.py", "new ä.py"]
    assert [str(path) for path in tool.changed_files("HEAD")] == ["changed.py", "gone.py", "new ä.py"]
