"""The benchmark's machinery: scenarios as processes, what is kept when they end early, form, table, plots."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import missing
from tests.fakes import scenario as fake
from tools import performance_docs
from wasi_nn_backend.bench import document as form
from wasi_nn_backend.bench.child import ScenarioProcess
from wasi_nn_backend.bench.document import Column, Document, Row, ScenarioResult, Target
from wasi_nn_backend.bench.machine import free_cores
from wasi_nn_backend.bench.plots import can_plot, plot_scenario
from wasi_nn_backend.bench.report import notes, render
from wasi_nn_backend.bench.runner import DOCUMENT_NAME, Runner
from wasi_nn_backend.bench.scenario import SCENARIOS, Options, load_scenario
from wasi_nn_backend.bench.workload import Span, tokens_per_s
from wasi_nn_backend.errors import InvalidArgument, RuntimeFailure

ROWS = [{"n": n, "speed": n * 1.5, "peer": None, "name": "fake"} for n in (1, 2)]
#: Of the quarter of an hour, for what is not measuring: starting, asking for free cores, drawing.
QUICK_S_MAX = 14 * 60


def empty_document(**values: Any) -> Document:
    machine = form.Machine(
        cpu="Abacus", n_cores=2, memory_bytes=1 << 30, system="none", llama_features=["AVX2"], has_amx=False
    )
    return Document(
        command="wasi-nn bench",
        extent="quick",
        started=datetime(2026, 1, 2, tzinfo=UTC),
        machine=machine,
        versions={"wasi-nn-backend": "0.0"},
        model=form.Model(name="none", file="none.gguf", n_bytes=1),
        **values,
    )


class Observer:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def began(self, result: ScenarioResult, number: int, n_scenarios: int) -> None:
        self.seen.append(f"{number}/{n_scenarios} {result.name}")

    def progress(self, text: str) -> None:
        self.seen.append(text)

    def ended(self, result: ScenarioResult) -> None:
        self.seen.append(f"{result.name}: {result.status}")


class ScriptedProcess:
    """Sends rows, calls ``then`` with itself, and goes on until it is stopped if ``is_endless``."""

    def __init__(self, then: Any = None, *, is_endless: bool = False) -> None:
        self.then = then
        self._is_endless = is_endless
        self._stopped = threading.Event()

    @contextmanager
    def start(self, _module: str, _options: Options) -> Iterator[ScriptedProcess]:
        yield self

    def events(self) -> Iterator[Mapping[str, Any]]:
        for values in ROWS:
            yield {"progress": "a row"}
            yield {"row": {"values": values}}
        if self.then is not None:
            self.then()
        if self._is_endless:
            assert self._stopped.wait(30)

    def stop(self) -> None:
        self._stopped.set()


def runner_of(document: Document, folder: Path, process: ScriptedProcess, n_free_cores: float = 2.0) -> Runner:
    ticks = iter(range(1000))
    return Runner(
        document,
        folder,
        start=process.start,
        clock=lambda: float(next(ticks)),
        count_free_cores=lambda _: n_free_cores,
    )


def test_a_run_measures_judges_and_writes(tmp_path: Path) -> None:
    document, observer = empty_document(), Observer()
    runner_of(document, tmp_path, ScriptedProcess()).run([fake.MODULE] * 2, Options(), observer)
    assert observer.seen == ["1/2 fake", "a row", "a row", "fake: done", "2/2 fake", "a row", "a row", "fake: done"]
    assert document.status == "done"
    assert notes(document) == []
    for result in document.scenarios:
        assert [row.values for row in result.rows] == ROWS
        assert [target.is_met for target in result.targets] == [True, None]
        assert result.duration_s > 0
    assert form.read(tmp_path / DOCUMENT_NAME) == document


def test_every_row_is_on_disk_at_once(tmp_path: Path) -> None:
    rows_on_disk: list[int] = []

    def look() -> None:
        rows_on_disk.append(len(form.read(tmp_path / DOCUMENT_NAME).scenarios[0].rows))

    runner_of(empty_document(), tmp_path, ScriptedProcess(look)).run([fake.MODULE], Options(), Observer())
    assert rows_on_disk == [len(ROWS)]


def test_stopping_keeps_what_was_measured_and_begins_nothing_more(tmp_path: Path) -> None:
    document, observer = empty_document(), Observer()
    process = ScriptedProcess(is_endless=True)
    runner = runner_of(document, tmp_path, process)
    process.then = runner.stop
    runner.run([fake.MODULE] * 3, Options(), observer)
    assert document.status == "interrupted"
    (result,) = form.read(tmp_path / DOCUMENT_NAME).scenarios
    assert result.status == "interrupted"
    assert [row.values for row in result.rows] == ROWS
    assert result.targets


def test_stopping_before_the_start(tmp_path: Path) -> None:
    runner = runner_of(document := empty_document(), tmp_path, ScriptedProcess())
    runner.stop()
    runner.run([fake.MODULE], Options(), Observer())
    assert (document.status, document.scenarios) == ("interrupted", [])


def test_only_a_quick_run_ends_at_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timers: list[tuple[float, bool]] = []

    class Timer:
        """Its time comes at once."""

        def __init__(self, seconds: float, function: Any) -> None:
            self._seconds, self._function = seconds, function

        def start(self) -> None:
            timers.append((self._seconds, True))
            self._function()

        def cancel(self) -> None:
            timers.append((self._seconds, False))

    monkeypatch.setattr(threading, "Timer", Timer)
    for is_quick, status in ((True, "out of time"), (False, "done")):
        timers.clear()
        document = empty_document()
        process = ScriptedProcess(is_endless=is_quick)
        runner_of(document, tmp_path, process).run([fake.MODULE], Options(is_quick=is_quick), Observer())
        assert document.scenarios[0].status == status
        assert ((60.0, True) in timers) is is_quick


def test_speed_counts_while_all_sessions_generate() -> None:
    one, early, late = Span(101, 0.0, 10.0), Span(101, 0.0, 20.0), Span(101, 9.0, 19.0)
    assert tokens_per_s([one]) == 10
    assert tokens_per_s([one, early, late]) == 10 + 5 + 10
    with pytest.raises(ValueError, match="never generated at the same time"):
        tokens_per_s([one, Span(101, 10.0, 20.0)])


def test_a_busy_machine_is_noted(tmp_path: Path) -> None:
    document = empty_document()
    runner_of(document, tmp_path, ScriptedProcess(), n_free_cores=1.3).run([fake.MODULE], Options(), Observer())
    (note,) = notes(document)
    assert "of its 2 cores 1.3 to 1.3 were free" in note
    assert note in render(document)


@pytest.mark.parametrize("n_cores", [1, 2])
def test_free_cores_are_some_of_all(n_cores: int) -> None:
    assert 0 < free_cores(n_cores, 0.02) <= n_cores * 1.5  # a last chunk may end after the time


def collect(model: str) -> tuple[list[str], list[dict[str, Any]]]:
    texts, rows = [], []
    with ScenarioProcess(fake.MODULE, Options(model=model)) as process:
        for event in process.events():
            if "row" in event:
                rows.append(Row.model_validate(event["row"]).values)
            else:
                texts.append(event["progress"])
    return texts, rows


def test_a_scenario_in_its_process() -> None:
    assert collect("none") == (["row 1", "row 2"], ROWS)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("die", "SIGSEGV"),
        ("fail", "this model has no words"),
        ("other-form", "a row of fake has"),
    ],
)
def test_a_failure_becomes_one_error_with_the_last_words(model: str, expected: str) -> None:
    with pytest.raises(RuntimeFailure, match=expected) as caught:
        collect(model)
    assert "a word of a library's on stdout" in str(caught.value)


@pytest.mark.parametrize(("model", "shows_where"), [("refuse", False), ("fail", True)])
def test_only_a_defect_shows_where_it_was_raised(model: str, shows_where: bool) -> None:
    with pytest.raises(RuntimeFailure) as caught:
        collect(model)
    assert ("Traceback" in str(caught.value)) is shows_where


def test_a_process_that_never_ends_is_stopped() -> None:
    with ScenarioProcess(fake.MODULE, Options(model="block")) as process:
        rows = []
        for event in process.events():
            rows += [event] if "row" in event else []
            if len(rows) == len(ROWS):
                process.stop()
    assert len(rows) == len(ROWS)


def test_a_failed_scenario_does_not_end_the_run(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeFailure("out of paper\nand the log")

    document = empty_document()
    runner_of(document, tmp_path, ScriptedProcess(fail)).run([fake.MODULE] * 2, Options(), Observer())
    assert [result.status for result in document.scenarios] == ["failed", "failed"]
    assert "**Failed** after 2 lines: out of paper\n" in render(document)


@pytest.fixture
def measured(tmp_path: Path) -> Document:
    document = empty_document()
    runner_of(document, tmp_path, ScriptedProcess()).run([fake.MODULE], Options(), Observer())
    return document


def test_the_table_shows_what_has_a_heading(measured: Document) -> None:
    text = render(measured)
    assert "| number | speed, 1/s | peer |" in text
    assert "|      2 |       3.00 |    - |" in text
    assert "in the file only" not in text
    assert "| the last speed " in text


def test_plots_are_made_in_both_formats(measured: Document, tmp_path: Path) -> None:
    needs_matplotlib()
    names = plot_scenario(fake.SCENARIO, measured.scenarios[0], measured, tmp_path)
    assert names == ["fake.png", "fake.svg"]
    assert (tmp_path / "fake.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "fake.svg").read_text()


def test_the_same_figures_make_the_same_file(measured: Document, tmp_path: Path) -> None:
    needs_matplotlib()
    texts = set()
    for _ in range(2):
        assert plot_scenario(fake.SCENARIO, measured.scenarios[0], measured, tmp_path, ["svg"]) == ["fake.svg"]
        texts.add((tmp_path / "fake.svg").read_text())
    assert len(texts) == 1


def test_without_rows_there_is_no_plot(measured: Document, tmp_path: Path) -> None:
    result = measured.scenarios[0].model_copy(update={"rows": []})
    assert plot_scenario(fake.SCENARIO, result, measured, tmp_path) == []


def needs_matplotlib() -> None:
    if not can_plot():
        missing("matplotlib is not installed; pip install -e '.[dev]'")


def test_the_form_is_the_documented_one() -> None:
    """A change that a reader could stumble over raises ``FORM``; then: python tools/performance_docs.py"""
    assert performance_docs.SCHEMA.read_text(encoding="utf-8") == performance_docs.schema()


def test_a_file_of_another_form_is_refused_with_the_place(measured: Document, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    for change, place in (({"form": 2}, "form"), ({"machine": {}}, "machine"), ({"more": 1}, "more")):
        path.write_text(json.dumps(json.loads(measured.model_dump_json()) | change))
        with pytest.raises(InvalidArgument, match=place):
            form.read(path)
    path.write_bytes(b"\xff")
    with pytest.raises(InvalidArgument, match="the file"):
        form.read(path)


@pytest.mark.parametrize(
    ("relation", "met", "missed"), [("at least", 1.0, 0.9), ("at most", 1.0, 1.1), ("above", 1.1, 1), ("below", 0.9, 1)]
)
def test_targets(relation: Any, met: float, missed: float) -> None:
    assert Target.of("x", met, relation, 1.0).is_met is True
    assert Target.of("x", missed, relation, 1.0).is_met is False
    assert Target.of("x", met, relation, 1.0).under("a full moon", holds=False).is_met is None


def test_columns_show_values() -> None:
    column = Column(key="x", heading="x", meaning="x", format=".1%")
    assert [column.text(value) for value in (0.5, None, "auto", True)] == ["50.0%", "-", "auto", "yes"]


def test_scenarios_have_their_names_and_leave_time_for_the_rest() -> None:
    scenarios = {name: load_scenario(module) for name, module in SCENARIOS.items()}
    assert {name: scenario.name for name, scenario in scenarios.items()} == {name: name for name in SCENARIOS}
    assert sum(scenario.quick_s_max for scenario in scenarios.values()) <= QUICK_S_MAX
    for scenario in scenarios.values():
        keys = [column.key for column in scenario.columns]
        assert len(set(keys)) == len(keys)


def test_what_is_no_scenario_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "SCENARIO", "a text")
    with pytest.raises(InvalidArgument, match="no Scenario"):
        load_scenario(fake.MODULE)


def test_the_documents_are_made_from_the_record() -> None:
    hint = "run: python tools/performance_docs.py"
    assert performance_docs.PAGE.read_text(encoding="utf-8") == performance_docs.page(RECORD), hint
    text = performance_docs.BENCHMARKS.read_text(encoding="utf-8")
    assert performance_docs.with_columns(text) == text, hint
    assert all((performance_docs.FOLDER / name).stat().st_size for each in RECORD.scenarios for name in each.plots)


RECORD = form.read(performance_docs.RECORD)


@pytest.mark.parametrize("result", RECORD.scenarios, ids=[result.name for result in RECORD.scenarios])
def test_scenarios_judge_and_draw_even_a_part_of_what_was_recorded(result: ScenarioResult, tmp_path: Path) -> None:
    needs_matplotlib()
    scenario = load_scenario(SCENARIOS[result.name])
    for row in result.rows:
        scenario.check(row)
    for n_rows in range(1, len(result.rows) + 1):
        targets = scenario.targets(result.rows[:n_rows], RECORD.machine.has_amx)
    assert targets == result.targets, "record anew"
    part = result.model_copy(update={"rows": result.rows[:1]})
    assert plot_scenario(scenario, part, empty_document(), tmp_path, ["svg"]) == [f"{result.name}.svg"]
