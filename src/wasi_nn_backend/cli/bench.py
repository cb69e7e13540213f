"""``wasi-nn bench``: measure this installation on this machine, and write a table, JSON and plots."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wasi_nn_backend.cli.exit_codes import ExitCode, exits_cleanly
from wasi_nn_backend.cli.interrupts import Cancellation, run_interruptibly
from wasi_nn_backend.errors import ModelNotFound

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from wasi_nn_backend.bench.document import Document, ScenarioResult
    from wasi_nn_backend.bench.scenario import Options, Scenario

__all__ = ["register"]

_REPORT = "report.md"


def register(app: typer.Typer) -> None:
    app.command("bench")(exits_cleanly(bench))


def bench(
    scenarios: Annotated[
        list[str] | None,
        typer.Argument(metavar="SCENARIO", help="What to measure; see --list.", show_default="all"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the files go.", show_default="wasi-nn-bench-DATE-TIME"),
    ] = None,
    is_quick: Annotated[
        bool, typer.Option("--quick/--full", help="Within a quarter of an hour on 2 cores, or the whole grid.")
    ] = True,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="PATH|smollm2", help="The model to measure with.", show_default="smollm2"
        ),
    ] = None,
    no_peers: Annotated[bool, typer.Option("--no-peers", help="Do not compare with other libraries.")] = False,
    list_them: Annotated[bool, typer.Option("--list", help="Say what each scenario measures, and exit.")] = False,
) -> None:
    """Measure this installation on this machine: speed with many sessions, overhead, sampling, memory, threads.

    Writes report.json, report.md and a plot of each scenario as PNG and SVG,
    and prints the tables. Other libraries are compared with where they are
    installed. Nothing else should run meanwhile; the report says whether that
    was so.

    Example: [bold]wasi-nn bench sessions memory --out results[/]

    Exit status: 0 all was measured, 1 something failed, 2 a wrong command
    line, 130 Ctrl-C, which leaves in the files what was measured so far.
    """
    from wasi_nn_backend.bench.scenario import Options, load_scenario
    from wasi_nn_backend.engine.sizing import n_usable_cores

    modules = _modules(scenarios or [])
    if list_them:
        for module in modules:
            scenario = load_scenario(module)
            print(
                f"{scenario.name}: {scenario.title} (quick: {scenario.quick_s_max:g} s at most)\n    {scenario.shows}"
            )
        return
    options = Options(model, is_quick=is_quick, with_peers=not no_peers, n_threads=n_usable_cores())
    _check_model(options)
    folder = out if out is not None else Path(f"wasi-nn-bench-{datetime.now():%Y%m%d-%H%M%S}")
    folder.mkdir(parents=True, exist_ok=True)
    made = run_interruptibly(lambda cancellation: _measure(modules, options, folder, cancellation))
    if any(result.status == "failed" for result in made.scenarios):
        raise typer.Exit(ExitCode.ERROR)


def _modules(names: Sequence[str]) -> list[str]:
    from wasi_nn_backend.bench.scenario import SCENARIOS

    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        raise typer.BadParameter(
            f"there is no scenario {unknown[0]!r}; there are: {', '.join(SCENARIOS)}", param_hint="SCENARIO"
        )
    return [module for name, module in SCENARIOS.items() if name in names or not names]


def _check_model(options: Options) -> None:
    """Before minutes are spent: each scenario would start, and fail for the same reason."""
    from wasi_nn_backend.llama.gguf_file import read_gguf_summary
    from wasi_nn_backend.registry import model_path

    path = model_path(options.model_name)
    if not path.is_file():
        raise ModelNotFound(f"there is no file {options.model_name}; give a GGUF file, or leave --model out")
    read_gguf_summary(path)


def _measure(modules: Sequence[str], options: Options, folder: Path, cancellation: Cancellation) -> Document:
    """Returns when all is measured, written and drawn, or with less after a cancellation."""
    from wasi_nn_backend.bench import document as form
    from wasi_nn_backend.bench import plots, report
    from wasi_nn_backend.bench.runner import DOCUMENT_NAME, Runner
    from wasi_nn_backend.bench.scenario import load_scenario

    scenarios = [load_scenario(module) for module in modules]
    with _progress("asking llama.cpp what it is"):
        document = _new_document(options, has_peers=any(scenario.has_peers for scenario in scenarios))
    _print_notes(document.warnings)
    runner = Runner(document, folder)
    with cancellation.calling(runner.stop):
        runner.run(modules, options, _Terminal(document.machine.n_cores))
    if not cancellation.requested and plots.can_plot():
        _draw(document, scenarios, folder)
        form.write(document, folder / DOCUMENT_NAME)
    (folder / _REPORT).write_text(report.render(document), encoding="utf-8")
    _print_notes([note for note in report.notes(document) if note not in document.warnings])
    names = [DOCUMENT_NAME, _REPORT, *(name for result in document.scenarios for name in result.plots)]
    print(f"{folder}: {', '.join(names)}", file=sys.stderr)
    return document


def _print_notes(warnings: Sequence[str]) -> None:
    for warning in warnings:
        print(f"note: {warning}", file=sys.stderr)


def _new_document(options: Options, *, has_peers: bool) -> Document:
    """Everything about the run that is known before it. Raises ``RuntimeFailure`` where llama.cpp does not load."""
    from wasi_nn_backend.bench import document as form
    from wasi_nn_backend.bench.machine import describe_machine, installed_versions
    from wasi_nn_backend.bench.peers import missing_peers
    from wasi_nn_backend.bench.plots import HOW_TO_PLOT, can_plot
    from wasi_nn_backend.llama.build_report import ask_child
    from wasi_nn_backend.registry import model_path

    build = ask_child()
    path = model_path(options.model_name)
    missing = missing_peers() if has_peers and options.with_peers else {}
    return form.Document(
        command=shlex.join(["wasi-nn", *sys.argv[1:]]),
        extent="quick" if options.is_quick else "full",
        started=datetime.now(UTC),
        machine=describe_machine(build),
        versions=installed_versions(build),
        model=form.Model(name=options.model_name, file=path.name, n_bytes=path.stat().st_size),
        warnings=[
            *(f"{name} is not compared with, since it is not installed: {hint}" for name, hint in missing.items()),
            *([] if can_plot() else [HOW_TO_PLOT]),
        ],
    )


def _draw(document: Document, scenarios: Sequence[Scenario], folder: Path) -> None:
    from wasi_nn_backend.bench.plots import plot_scenario

    with _progress("drawing"):
        for scenario, result in zip(scenarios, document.scenarios, strict=True):
            result.plots = plot_scenario(scenario, result, document, folder)


class _Terminal:
    """Tables on stdout, what is being measured on stderr."""

    def __init__(self, n_cores: int) -> None:
        self._n_cores = n_cores
        self._shown = ExitStack()
        self._bar: tuple[Progress, TaskID] | None = None

    def began(self, result: ScenarioResult, number: int, n_scenarios: int) -> None:
        from wasi_nn_backend.bench.report import BUSY_BELOW

        if number == 1 and result.n_free_cores_before < BUSY_BELOW * self._n_cores:
            _print_notes([f"the machine is busy: {result.n_free_cores_before:.1f} of {self._n_cores} cores are free"])
        self._bar = self._shown.enter_context(_progress(f"{number}/{n_scenarios} {result.name}"))

    def progress(self, text: str) -> None:
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, step=text)

    def ended(self, result: ScenarioResult) -> None:
        from wasi_nn_backend.bench.report import scenario_section

        self._shown.close()
        print(f"## {result.title}\n\n{scenario_section(result)}\n", flush=True)
        if result.error:
            print(f"{result.name}: {result.error}", file=sys.stderr)


@contextmanager
def _progress(label: str) -> Iterator[tuple[Progress, TaskID] | None]:
    """A line that moves where stderr is a terminal that can show one, else one line and None."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        print(label, file=sys.stderr, flush=True)
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[step]}", markup=False),
    )
    # Tables go to stdout while nothing moves, so it need not be redirected to where the line is drawn.
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, refresh_per_second=2) as progress:
        yield progress, progress.add_task(label, step="")
