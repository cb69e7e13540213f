"""Runs scenarios one after the other and keeps the document on disk up to date, so that nothing measured is lost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from wasi_nn_backend.bench import document as form
from wasi_nn_backend.bench.child import ScenarioProcess
from wasi_nn_backend.bench.document import Document, Row, ScenarioResult, Status
from wasi_nn_backend.bench.machine import free_cores
from wasi_nn_backend.bench.scenario import Options, Scenario, load_scenario
from wasi_nn_backend.errors import RuntimeFailure

__all__ = ["DOCUMENT_NAME", "Observer", "Runner"]

DOCUMENT_NAME = "report.json"


class Observer(Protocol):
    """Whoever shows a person what goes on."""

    def began(self, result: ScenarioResult, number: int, n_scenarios: int) -> None: ...

    def progress(self, text: str) -> None: ...

    def ended(self, result: ScenarioResult) -> None: ...


class Process(Protocol):
    def events(self) -> Iterator[Mapping[str, Any]]: ...

    def stop(self) -> None: ...


class Runner:
    """Measures into ``document``, and writes it into ``folder`` after every row."""

    def __init__(
        self,
        document: Document,
        folder: Path,
        *,
        start: Callable[[str, Options], AbstractContextManager[Process]] = ScenarioProcess,
        clock: Callable[[], float] = time.monotonic,
        count_free_cores: Callable[[int], float] = free_cores,
    ) -> None:
        self._document = document
        self._path = folder / DOCUMENT_NAME
        self._start = start
        self._clock = clock
        self._count_free_cores = count_free_cores
        self._lock = threading.Lock()
        self._process: Process | None = None
        self._is_interrupted = False

    def stop(self) -> None:
        """From any thread: end what runs and begin nothing more; ``run`` returns with what there is."""
        with self._lock:
            self._is_interrupted = True
            if self._process is not None:
                self._process.stop()

    def run(self, modules: Sequence[str], options: Options, observer: Observer) -> None:
        start_s = self._clock()
        for number, module in enumerate(modules, 1):
            if self._is_interrupted:
                break
            scenario = load_scenario(module)
            result = self._begin(scenario)
            observer.began(result, number, len(modules))
            self._measure(module, scenario, result, options, observer)
            self._document.duration_s = self._clock() - start_s
            form.write(self._document, self._path)
            observer.ended(result)
        self._document.status = "interrupted" if self._is_interrupted else "done"
        form.write(self._document, self._path)

    def _begin(self, scenario: Scenario) -> ScenarioResult:
        result = ScenarioResult(
            name=scenario.name,
            title=scenario.title,
            shows=scenario.shows,
            method=scenario.method,
            command=scenario.command,
            n_free_cores_before=self._count_free_cores(self._document.machine.n_cores),
            columns=list(scenario.columns),
        )
        self._document.scenarios.append(result)
        return result

    def _measure(
        self, module: str, scenario: Scenario, result: ScenarioResult, options: Options, observer: Observer
    ) -> None:
        start_s = self._clock()
        try:
            result.status = self._collect(module, scenario, result, options, observer)
        except RuntimeFailure as error:
            result.status, result.error = "failed", str(error)
        result.duration_s = self._clock() - start_s
        if result.rows:
            result.targets = scenario.targets(result.rows, self._document.machine.has_amx)
        if not self._is_interrupted:  # a person waits
            result.n_free_cores_after = self._count_free_cores(self._document.machine.n_cores)

    def _collect(
        self, module: str, scenario: Scenario, result: ScenarioResult, options: Options, observer: Observer
    ) -> Status:
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            process.stop()

        with self._start(module, options) as process:
            timer = threading.Timer(scenario.quick_s_max, end)
            if options.is_quick:
                timer.start()
            try:
                self._set_process(process)
                for event in process.events():
                    if "row" in event:
                        result.rows.append(Row.model_validate(event["row"]))
                        form.write(self._document, self._path)
                    else:
                        observer.progress(event["progress"])
            finally:
                timer.cancel()
                self._set_process(None)
        if self._is_interrupted:
            return "interrupted"
        return "out of time" if is_late.is_set() else "done"

    def _set_process(self, process: Process | None) -> None:
        with self._lock:
            self._process = process
            if process is not None and self._is_interrupted:
                process.stop()
