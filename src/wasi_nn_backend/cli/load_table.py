"""From two samples of a status to the rows of ``wasi-nn top``, and to the table that shows them."""

from __future__ import annotations

import os.path
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from wasi_nn_backend.cli.status_client import BackendSample, EngineSample, StatusSample, TaskSample
from wasi_nn_backend.cli.terminal import format_bytes

__all__ = ["Load", "LoadRow", "measure_load", "render_load"]

_UNITS = ("", "k", "M", "G", "T", "P", "E")
_NUMBERS = ("Sessions", "Queued", "Batch", "KV cells", "Tokens/s", "Prompt/s")
_N_GRAPH_COLUMNS_MIN = 10


@dataclass(frozen=True, slots=True)
class LoadRow:
    """A graph, or all. ``n_sequences_per_step`` is the mean batch between the samples, of ``n_sequences`` places;
    the speeds are generated tokens, and prompt tokens that were computed, None without an earlier sample.
    """

    name: str
    n_sessions: int
    n_queued: int
    n_running: int
    n_sequences_per_step: float
    n_sequences: int
    n_cells_used: int
    n_cells: int
    tokens_per_s: float | None
    prompt_tokens_per_s: float | None


@dataclass(frozen=True, slots=True)
class Load:
    """``n_by_reason`` are tasks that are over since the process began."""

    pid: int
    rows: tuple[LoadRow, ...]
    total: LoadRow
    n_by_reason: Mapping[str, int]
    n_host_bytes: int

    def as_json(self) -> dict[str, Any]:
        return {
            "pid": self.pid,
            "graphs": [asdict(row) for row in self.rows],
            "total": asdict(self.total),
            "finished": dict(self.n_by_reason),
            "n_host_bytes": self.n_host_bytes,
        }


@dataclass(frozen=True, slots=True)
class _Interval:
    """One backend's sample and the one before, None where there is none that it continues."""

    now: BackendSample
    before: BackendSample | None

    def speeds(self, graphs: set[str]) -> tuple[float, float] | None:
        """(generated, computed of prompts) in tokens a second."""
        if self.before is None or self.now.now_s <= self.before.now_s:
            return None
        duration_s = self.now.now_s - self.before.now_s
        n_generated, n_computed = _n_tokens(self.now.tasks, graphs)
        n_generated_before, n_computed_before = _n_tokens(self.before.tasks, graphs)
        new, computed = max(0, n_generated - n_generated_before), max(0, n_computed - n_computed_before)
        return new / duration_s, max(0, computed - new) / duration_s

    def n_sequences_per_step(self, engine: EngineSample) -> float:
        """What runs now where there was no step in between, or nothing to compare with."""
        known = {each.id: each for each in self.before.engines} if self.before else {}
        before = known.get(engine.id)
        if before is None or engine.n_steps <= before.n_steps:
            return float(engine.n_running)
        return (engine.n_sequence_steps - before.n_sequence_steps) / (engine.n_steps - before.n_steps)


def measure_load(now: StatusSample, before: StatusSample | None) -> Load:
    """``before`` None, or of another process, gives no speeds."""
    earlier = {} if before is None or before.pid != now.pid else {each.name: each for each in before.backends}
    intervals = [_Interval(each, earlier.get(each.name)) for each in now.backends]
    rows = [row for interval in intervals for row in _rows(interval)]
    finished: Counter[str] = Counter()
    for backend in now.backends:
        for tasks in backend.tasks:
            finished.update(tasks.n_by_reason)
    return Load(
        pid=now.pid,
        rows=tuple(rows),
        total=_sum("Total", [_total(interval) for interval in intervals]),
        n_by_reason=dict(finished.most_common()),
        n_host_bytes=sum(engine.n_host_bytes for each in now.backends for engine in each.engines),
    )


def _n_tokens(tasks: Iterable[TaskSample], graphs: set[str]) -> tuple[int, int]:
    rows = [row for row in tasks if row.graph in graphs]
    return sum(row.n_tokens_generated for row in rows), sum(row.n_tokens_computed for row in rows)


def _rows(interval: _Interval) -> list[LoadRow]:
    """One a name: guests may have loaded it several times."""
    backend = interval.now
    prefix = f"{backend.name}: " if backend.name else ""
    rows = []
    for name in sorted({graph.name for graph in backend.graphs}):
        graphs = [graph for graph in backend.graphs if graph.name == name]
        engines = {graph.engine.id: graph.engine for graph in graphs}.values()
        sessions = [(graph.n_sessions, graph.n_queued, graph.n_running) for graph in graphs]
        rows.append(_row(interval, prefix + name, sessions, engines, {name}))
    return rows


def _total(interval: _Interval) -> LoadRow:
    """With graphs that are unloaded since, whose tokens count, and engines that no graph has for itself."""
    backend = interval.now
    sessions = [(graph.n_sessions, graph.n_queued, graph.n_running) for graph in backend.graphs]
    return _row(interval, backend.name, sessions, backend.engines, {row.graph for row in backend.tasks})


def _row(
    interval: _Interval,
    name: str,
    sessions: Sequence[tuple[int, int, int]],
    engines: Iterable[EngineSample],
    graphs: set[str],
) -> LoadRow:
    speeds = interval.speeds(graphs)
    engines = list(engines)
    return LoadRow(
        name=name,
        n_sessions=sum(n_sessions for n_sessions, _, _ in sessions),
        n_queued=sum(n_queued for _, n_queued, _ in sessions),
        n_running=sum(n_running for _, _, n_running in sessions),
        n_sequences_per_step=sum(interval.n_sequences_per_step(engine) for engine in engines),
        n_sequences=sum(engine.n_sequences for engine in engines),
        n_cells_used=sum(engine.n_cells_used for engine in engines),
        n_cells=sum(engine.n_cells for engine in engines),
        tokens_per_s=None if speeds is None else speeds[0],
        prompt_tokens_per_s=None if speeds is None else speeds[1],
    )


def _sum(name: str, rows: Sequence[LoadRow]) -> LoadRow:
    known = [row for row in rows if row.tokens_per_s is not None]
    return LoadRow(
        name=name,
        n_sessions=sum(row.n_sessions for row in rows),
        n_queued=sum(row.n_queued for row in rows),
        n_running=sum(row.n_running for row in rows),
        n_sequences_per_step=sum(row.n_sequences_per_step for row in rows),
        n_sequences=sum(row.n_sequences for row in rows),
        n_cells_used=sum(row.n_cells_used for row in rows),
        n_cells=sum(row.n_cells for row in rows),
        tokens_per_s=sum(row.tokens_per_s or 0.0 for row in known) if known else None,
        prompt_tokens_per_s=sum(row.prompt_tokens_per_s or 0.0 for row in known) if known else None,
    )


# What people see.


def render_load(load: Load, url: str, problem: str | None = None) -> RenderableType:
    """``problem`` is shown beside figures that are no longer new."""
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), expand=True, show_footer=len(load.rows) != 1
    )
    total = _cells(load.total)
    table.add_column("Graph", total[0], ratio=1, min_width=_N_GRAPH_COLUMNS_MIN, no_wrap=True, overflow="ellipsis")
    for title, sum_of_all in zip(_NUMBERS, total[1:], strict=True):
        table.add_column(title, sum_of_all, justify="right", no_wrap=True)
    for row in load.rows:
        table.add_row(*_cells(row))
    heading = Text(_printable(f"{url}, process {load.pid}"), no_wrap=True, overflow="ellipsis", style="bold")
    lines: list[RenderableType] = [heading, table, Text(_finished(load))]
    return Group(*lines, *([] if problem is None else [Text(_printable(problem), style="red")]))


def _cells(row: LoadRow) -> list[Text]:
    share = f" {_short(100 * row.n_cells_used / row.n_cells, n_digits=0)}%" if row.n_cells else ""
    return [
        Text(_printable(_base_name(row.name))),
        Text(_short(row.n_sessions)),
        Text(_short(row.n_queued)),
        Text(f"{_short(row.n_sequences_per_step)}/{_short(row.n_sequences)}"),
        Text(f"{_short(row.n_cells_used)}/{_short(row.n_cells)}{share}"),
        Text("-" if row.tokens_per_s is None else _short(row.tokens_per_s)),
        Text("-" if row.prompt_tokens_per_s is None else _short(row.prompt_tokens_per_s)),
    ]


def _finished(load: Load) -> str:
    n_finished = sum(load.n_by_reason.values())
    reasons = ", ".join(f"{_short(n)} {_printable(reason)}" for reason, n in load.n_by_reason.items())
    host = f"; {format_bytes(load.n_host_bytes)} of sessions in host memory" if load.n_host_bytes else ""
    return f"{_short(n_finished)} requests are over{f' ({reasons})' if reasons else ''}{host}"


def _short(number: float, n_digits: int = 1) -> str:
    """At most five characters up to 10^21: ``9.5``, ``812``, ``12.3k``, ``4.07M``."""
    size = float(number)
    for unit in _UNITS:
        if size < 999.5:
            if not unit:
                return f"{size:.{n_digits if size < 99.5 else 0}f}".removesuffix(".0")
            return f"{size:.2f}{unit}" if size < 9.995 else f"{size:.1f}{unit}" if size < 99.95 else f"{size:.0f}{unit}"
        size /= 1000
    return f"{float(number):.0e}"


def _base_name(name: str) -> str:
    """Graphs that were loaded from a path have it as their name."""
    return os.path.basename(name) or name


def _printable(text: str) -> str:
    """Names come from configurations and guests: nothing of them may steer the terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
