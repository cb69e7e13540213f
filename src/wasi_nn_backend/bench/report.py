"""A benchmark's document as Markdown, for people: the same in a terminal, in a file and in the documentation."""

from __future__ import annotations

from collections.abc import Sequence

from wasi_nn_backend.bench.document import Document, ScenarioResult, Target

__all__ = ["BUSY_BELOW", "conditions", "n_lines", "notes", "render", "scenario_section", "target_table"]

#: With a smaller part of its cores for itself, a benchmark was not alone.
BUSY_BELOW = 0.9

_GIB = 1 << 30
_MET = {True: "yes", False: "**no**", None: "does not apply"}


def render(document: Document) -> str:
    """The whole report."""
    parts = ["# wasi-nn bench", conditions(document), _list([f"**note**: {note}" for note in notes(document)])]
    targets = [(result, target) for result in document.scenarios for target in result.targets]
    if targets:
        parts += ["## Targets", target_table([target for _, target in targets])]
    parts += [f"## {result.title}\n\n{scenario_section(result)}" for result in document.scenarios]
    return "\n\n".join(filter(None, parts)) + "\n"


def conditions(document: Document) -> str:
    """Machine, versions, command and time, as a list."""
    machine = document.machine
    memory = f", {machine.memory_bytes / _GIB:.1f} GiB of memory" if machine.memory_bytes is not None else ""
    free = _free_cores(document)
    lines = [
        f"machine: {machine.cpu}, {machine.n_cores} cores{memory}; {machine.system}",
        f"llama.cpp uses: {' '.join(machine.llama_features)}",
        f"model: {document.model.file} ({document.model.n_bytes / 1e6:.0f} MB)",
        "versions: " + ", ".join(f"{name} {version}" for name, version in document.versions.items()),
        f"command: `{document.command}`",
        f"{document.extent} run of {document.started:%Y-%m-%d %H:%M} UTC, {document.duration_s / 60:.1f} minutes"
        f"{'' if document.status == 'done' else f', {document.status}'}: "
        + ", ".join(f"{each.name} {each.duration_s:.0f} s" for each in document.scenarios),
    ]
    if free:
        lines.append(f"cores that were free before and after scenarios: {min(free):.1f} to {max(free):.1f}")
    return _list(lines)


def notes(document: Document) -> list[str]:
    """What keeps the figures from saying all that they could."""
    free, n_cores = _free_cores(document), document.machine.n_cores
    if min(free, default=n_cores) >= BUSY_BELOW * n_cores:
        return document.warnings
    busy = (
        f"the machine was busy: of its {n_cores} cores {min(free):.1f} to {max(free):.1f} were free before and after "
        "scenarios. Ratios compare what took turns and suffer less than speeds; measure again when nothing else runs"
    )
    return [*document.warnings, busy]


def _free_cores(document: Document) -> list[float]:
    return [
        n for each in document.scenarios for n in (each.n_free_cores_before, each.n_free_cores_after) if n is not None
    ]


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def scenario_section(result: ScenarioResult, *, plot_folder: str = "") -> str:
    """Everything below a scenario's heading. Of its plots, the SVG in ``plot_folder`` is shown."""
    parts = [result.shows, _status(result)]
    if result.rows:
        shown = [column for column in result.columns if column.heading]
        cells = [[column.text(row.values[column.key]) for column in shown] for row in result.rows]
        parts.append(_table([column.heading for column in shown], cells))
    if result.targets:
        parts.append(target_table(result.targets))
    parts += [f"![{result.title}]({plot_folder}{name})" for name in result.plots if name.endswith(".svg")]
    parts.append(f"{result.method} Alone: `{result.command}`.")
    return "\n\n".join(filter(None, parts))


def n_lines(result: ScenarioResult) -> str:
    return f"{len(result.rows)} line{'s' * (len(result.rows) != 1)}"


def _status(result: ScenarioResult) -> str:
    n = n_lines(result)
    if result.status == "failed":
        return f"**Failed** after {n}: {result.error.splitlines()[0] if result.error else 'without a message'}"
    if result.status == "out of time":
        return f"**Out of time** after {n} in {result.duration_s:.0f} s: the machine is too slow or too busy for more."
    return f"**Interrupted** after {n}." if result.status == "interrupted" else ""


def target_table(targets: Sequence[Target]) -> str:
    cells = [
        [
            target.name + (f" (on {target.condition})" if target.condition else ""),
            format(target.value, target.format),
            f"{target.relation} {_bound(target)}",
            _MET[target.is_met],
        ]
        for target in targets
    ]
    return _table(["target", "measured", "is to be", "met"], cells)


def _bound(target: Target) -> str:
    return f"{target.bound:.0%}" if target.format.endswith("%") else f"{target.bound:g}"


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """With columns of equal width, so that the text is readable as it is; numbers to the right."""
    columns = list(zip(headings, *rows, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    is_number = [all(cell[:1].isdigit() or cell == "-" for cell in column[1:]) for column in columns]
    lines = [
        "| "
        + " | ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_number, strict=True)
        )
        + " |"
        for row in (headings, *rows)
    ]
    ends = [":" if right else "-" for right in is_number]
    rule = " | ".join("-" * (width - 1) + end for width, end in zip(widths, ends, strict=True))
    return "\n".join([lines[0], f"| {rule} |", *lines[1:]])
