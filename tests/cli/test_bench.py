"""``wasi-nn bench``: the files that it leaves, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Command
from tests.conftest import missing
from tests.fakes import scenario as fake
from wasi_nn_backend.bench import document as form
from wasi_nn_backend.bench import plots, scenario

#: The command with the fake scenario beside the real ones, as a process.
PROGRAM = f"""
import sys
from wasi_nn_backend.bench import scenario
scenario.SCENARIOS["fake"] = {fake.MODULE!r}
from wasi_nn_backend.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def fake_scenario(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scenario.SCENARIOS, "fake", fake.MODULE)


@pytest.fixture
def models(tmp_path: Path, tiny_model_path: Path) -> Path:
    """A model under the names that tell the fake what to do."""
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("none", "fail", "interrupt"):
        (folder / name).symlink_to(tiny_model_path)
    return folder


def test_the_files_and_the_table(wasi_nn_here: Command, models: Path, tmp_path: Path) -> None:
    if not plots.can_plot():
        missing("matplotlib is not installed; pip install -e '.[dev]'")
    done = wasi_nn_here("bench", "fake", "--model", models / "none", "--out", "results/here")
    assert done.returncode == 0, done.stderr
    assert "## Nothing at all" in done.stdout
    assert "|      2 |       3.00 |" in done.stdout
    folder = tmp_path / "results" / "here"
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.md", "fake.png", "fake.svg"}
    assert all(path.stat().st_size for path in folder.iterdir())
    document = form.read(folder / "report.json")
    assert document.status == "done"
    assert document.scenarios[0].plots == ["fake.png", "fake.svg"]
    assert {"python", "llama.cpp", "wasi-nn-backend"} <= set(document.versions)
    assert document.machine.cpu in (folder / "report.md").read_text()


def test_without_matplotlib_there_are_table_and_json(
    wasi_nn_here: Command, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "can_plot", lambda: False)
    done = wasi_nn_here("bench", "fake", "--model", models / "none", "--out", "out")
    assert done.returncode == 0
    assert "wasi-nn-backend[bench]" in done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.json", "report.md"}


def test_a_failed_scenario_is_an_error_after_the_others(wasi_nn_here: Command, models: Path, tmp_path: Path) -> None:
    done = wasi_nn_here("bench", "fake", "--model", models / "fail", "--out", "out")
    assert done.returncode == 1
    assert "this model has no words" in done.stderr
    (result,) = form.read(tmp_path / "out" / "report.json").scenarios
    assert (result.status, len(result.rows)) == ("failed", 2)


def test_ctrl_c_leaves_what_was_measured(models: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, "bench", "fake", "--model", models / "interrupt", "--out", "out"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 130, done.stderr
    document = form.read(tmp_path / "out" / "report.json")
    assert (document.status, document.scenarios[0].status) == ("interrupted", "interrupted")
    assert len(document.scenarios[0].rows) == 2
    assert "**Interrupted** after 2 lines" in (tmp_path / "out" / "report.md").read_text()


def test_the_list_says_what_there_is(wasi_nn_here: Command) -> None:
    done = wasi_nn_here("bench", "--list")
    assert done.returncode == 0
    assert [name for name in scenario.SCENARIOS if f"{name}: " not in done.stdout] == []


def test_mistakes_are_told_before_anything_runs(wasi_nn_here: Command, tmp_path: Path) -> None:
    unknown = wasi_nn_here("bench", "speed")
    assert unknown.returncode == 2
    assert "sessions, overhead" in unknown.stderr
    no_model = wasi_nn_here("bench", "fake", "--model", "missing.gguf", "--out", "out")
    assert no_model.returncode == 1
    assert "missing.gguf" in no_model.stderr
    (tmp_path / "junk.gguf").write_bytes(b"no model")
    junk = wasi_nn_here("bench", "fake", "--model", "junk.gguf", "--out", "out")
    assert (junk.returncode, junk.stdout) == (1, "")
    assert junk.stderr.startswith("error: junk.gguf ")
    assert not (tmp_path / "out").exists()


@pytest.mark.real
def test_the_smallest_scenario_with_a_real_model(wasi_nn_here: Command, smollm2_path: Path, tmp_path: Path) -> None:
    done = wasi_nn_here("bench", "overhead", "--no-peers", "--model", smollm2_path, "--out", "out")
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "out" / "report.json").read_text())["scenarios"]
    assert result["status"] in ("done", "out of time")  # the latter on a busy machine
    for row in result["rows"]:
        assert 0 < row["values"]["share"] < 1
    assert result["rows"]
