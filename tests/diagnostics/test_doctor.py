"""What `gptjax doctor` finds, on machines and installations that are made up."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax
import pytest

from gptjax.cli import main
from gptjax.diagnostics import doctor
from gptjax.diagnostics.doctor import PROBES, Problem, examine, in_range
from gptjax.support import installation

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """Versions of packages that are pretended, None for one that is not installed; the others are real."""
    # What a machine has besides what is needed, in whatever versions, is no matter of these tests.
    pretended: dict[str, str | None] = {
        name: None for name, _, extra in doctor._requirements() if extra and name != "jax"
    }
    real = metadata.version

    def version(name: str) -> str:
        found = pretended[name] if name in pretended else real(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    return pretended


def test_here_all_is_well(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("\n\nno problems found\n")
    for text in (jax.__version__, "gpt2-tales", "GPTJAX_CACHE_DIR", "attention", "available"):
        assert text in out


def test_json_has_every_topic(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == {*PROBES, "problems", "works"}
    assert (report["problems"], report["works"]) == ([], True)
    assert report["versions"]["jax"] == jax.__version__
    assert report["devices"]["device 0 available_bytes"] > 0
    assert report["implementations"]["attention"].startswith("xla (Pallas kernels ")
    assert report["demo"]["fits"] == "yes"
    assert report["environment"]["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("version", "wanted", "holds"),
    [
        ("0.10.2", ">=0.10.2,<0.13", True),
        ("0.13", ">=0.10.2,<0.13", False),
        ("0.13.0", "<0.13", False),
        ("0.9.9", ">=0.10.2", False),
        ("2.0", ">=2.0.0", True),
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.13.1", "==2.13.0", False),
        ("1.2", "!=1.2", False),
        ("1.2", "<=1.1", False),
        ("1.2", ">1.2", False),
        ("3", "", True),
    ],
)
def test_ranges(version, wanted, holds):
    assert in_range(version, wanted) is holds


def test_a_package_out_of_range_stops_work(installed, capsys):
    installed.update({"jax": "0.9.0", "orbax-checkpoint": None})
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert '1. gptjax needs jax >=0.10.2,<0.13, found 0.9.0\n   pip install "jax>=0.10.2,<0.13"' in out
    assert '2. orbax-checkpoint is not installed\n   pip install "orbax-checkpoint>=' in out
    assert "no problems found" not in out
    assert "works nevertheless" not in out


def test_an_optional_package_out_of_range_does_not(installed, capsys):
    installed["transformers"] = "4.1"
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert '1. gptjax\'s extra "oracle" needs transformers >=' in out
    assert "found 4.1" in out
    assert out.endswith("gptjax works nevertheless\n")


def test_ranges_of_an_installed_package_come_from_its_metadata(monkeypatch, tmp_path):
    monkeypatch.setattr(installation, "_CHECKOUT", tmp_path)
    lines = ["jax<0.13,>=0.10.2", 'jax[cuda13]<0.13; extra == "cuda13"']
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    assert doctor._requirements() == [("jax", "<0.13,>=0.10.2", ""), ("jax", "<0.13", "cuda13")]


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(doctor, "nvidia_cards", lambda: ["NVIDIA H200"])
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")


def test_cards_are_found_by_nvidia_smi(monkeypatch, tmp_path):
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA L4 (UUID: GPU-2)'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert doctor.nvidia_cards(tmp_path) == ["NVIDIA H200", "NVIDIA L4"]
    script.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    assert doctor.nvidia_cards(tmp_path) == []


def test_cards_are_found_without_nvidia_smi(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    assert doctor.nvidia_cards(tmp_path) == []
    information = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0/information"
    information.parent.mkdir(parents=True)
    information.write_text("Model: \t\t NVIDIA L4\nIRQ: 1\n")
    assert doctor.nvidia_cards(tmp_path) == ["NVIDIA L4"]


def test_a_card_that_jax_is_not_installed_for(card, installed, capsys, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    installed.update({"jax-cuda12-plugin": None, "jax-cuda13-plugin": None})
    assert main(["doctor"]) == 0  # it works on the CPU
    out = capsys.readouterr().out
    assert "1. this machine has a GPU (NVIDIA H200), but JAX computes on the CPU" in out
    assert f"   {installation.with_extra('cuda13')}\n" in out


def test_a_card_that_jax_was_told_not_to_use_or_cannot(card, installed, monkeypatch):
    installed["jax-cuda13-plugin"] = "0.10.2"
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert [problem.fix for problem in examine().problems] == ["unset JAX_PLATFORMS"]
    monkeypatch.delenv("JAX_PLATFORMS")
    assert "driver" in examine().problems[0].fix


@pytest.mark.parametrize("topic", PROBES)
@pytest.mark.parametrize(
    ("error", "works"), [(ImportError("no module x"), False), (RuntimeError("broken\nmore"), None)]
)
def test_a_probe_that_fails_is_a_problem_and_the_others_go_on(monkeypatch, topic, error, works):
    def probe():
        raise error

    monkeypatch.setattr(doctor, "PROBES", {name: lambda: ({}, []) for name in PROBES} | {topic: probe})
    report = examine()
    assert report.facts.keys() == PROBES.keys()
    (problem,) = report.problems
    assert problem.problem == f"{topic} could not be examined ({type(error).__name__}: {str(error).splitlines()[0]})"
    assert problem.fix
    assert report.works is ((topic != "devices") if works is None else works)


def test_without_jax_it_says_so_and_does_not_raise(tmp_path):
    (tmp_path / "jax.py").write_text("raise ImportError('jaxlib is missing')\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from gptjax.cli import main; sys.exit(main(['doctor']))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 1
    assert result.stderr == ""
    assert "devices could not be examined (ImportError: jaxlib is missing)" in result.stdout
    assert "python" in result.stdout


def test_secrets_are_not_shown(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_abcdef")
    monkeypatch.setenv("XLA_FLAGS", "--xla_something")
    monkeypatch.setenv("MY_XLA_FLAGS", "not ours")
    facts, _ = doctor.environment()
    assert (facts["HF_TOKEN"], facts["HUGGING_FACE_HUB_TOKEN"]) == ("set, not shown", "set, not shown")
    assert facts["XLA_FLAGS"] == "--xla_something"
    assert "MY_XLA_FLAGS" not in facts
    main(["doctor"])
    assert "hf_abcdef" not in capsys.readouterr().out


@pytest.mark.parametrize(("value", "stops"), [("64", False), ("x", True), ("0", True), ("-1", True)])
def test_a_max_length_that_is_no_number(monkeypatch, value, stops):
    monkeypatch.setenv("GPTJAX_MAX_LENGTH", value)
    assert [problem.stops_work for problem in doctor.environment()[1]] == [True] * stops


@pytest.fixture
def no_directory_in_jax():
    """As before anything was loaded, which tells JAX where to keep programs."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.usefixtures("no_directory_in_jax")
def test_compiled_programs(monkeypatch, tmp_path):
    monkeypatch.setenv("GPTJAX_CACHE_DIR", "")
    assert "none" in doctor.compiled_programs()[0]["directory"]
    monkeypatch.setenv("GPTJAX_CACHE_DIR", str(tmp_path / "new"))
    facts, problems = doctor.compiled_programs()
    assert facts == {"directory": str(tmp_path / "new" / "xla"), "writable": True, "files": 0, "size_bytes": 0}
    assert problems == []
    assert not (tmp_path / "new").exists()  # nothing is changed
    (tmp_path / "new" / "xla").mkdir(parents=True)
    (tmp_path / "new" / "xla" / "program").write_bytes(b"12345")
    assert doctor.compiled_programs()[0]["size_bytes"] == 5
    (tmp_path / "new" / "executables").mkdir(mode=0o700)
    assert doctor.compiled_programs()[1] == []
    (tmp_path / "new" / "executables").chmod(0o777)
    (problem,) = doctor.compiled_programs()[1]
    assert "others may write to it" in problem.problem
    assert not problem.stops_work
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPTJAX_CACHE_DIR", str(tmp_path / "file"))
    facts, (problem,) = doctor.compiled_programs()
    assert facts["writable"] is False
    assert not problem.stops_work
    assert "GPTJAX_CACHE_DIR" in problem.fix


def test_a_demo_that_is_cut_or_missing(monkeypatch, tmp_path, demo):
    monkeypatch.setattr("gptjax.checkpoints.hub.DEMOS", tmp_path)
    for build in (
        lambda path: None,
        lambda path: (path / "config.json").write_bytes((demo / "config.json").read_bytes()),
    ):
        path = tmp_path / "gpt2-tales"
        path.mkdir(exist_ok=True)
        build(path)
        (problem,) = doctor.demo()[1]
        assert isinstance(problem, Problem)
        assert problem.stops_work
        assert "reinstall gptjax" in problem.fix
