"""Plots of scenarios, as PNG and SVG. matplotlib is imported only here, and only to draw."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from wasi_nn_backend.bench.document import Document, ScenarioResult
    from wasi_nn_backend.bench.scenario import Scenario

__all__ = [
    "HOW_TO_PLOT",
    "PLOT_FORMATS",
    "bars_against_bounds",
    "can_plot",
    "grouped_bars",
    "plot_scenario",
    "stacked_bars",
]

HOW_TO_PLOT = "there are no plots, since matplotlib is not installed: pip install 'wasi-nn-backend[bench]'"
PLOT_FORMATS = ("png", "svg")
#: Okabe and Ito's colours, which people with every kind of colour vision can tell apart.
_COLOURS = ("#0072B2", "#999999", "#E69F00", "#CC79A7", "#009E73", "#56B4E9")
_MET, _MISSED = "#009E73", "#D55E00"
#: Any: matplotlib's own type is a union of some 300 names.
_STYLE: Any = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "grid.color": "#dddddd",
    "savefig.facecolor": "white",
    "svg.hashsalt": "wasi-nn-backend",  # the same figures make the same file
}
_N_LABEL_CHARS = 42


def can_plot() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot_scenario(
    scenario: Scenario, result: ScenarioResult, document: Document, folder: Path, formats: Sequence[str] = PLOT_FORMATS
) -> list[str]:
    """Write ``NAME.png`` and ``NAME.svg`` and return their names; none without rows."""
    if not result.rows:
        return []
    import matplotlib as mpl  # noqa: PLC0415  takes a second, and may not be installed
    from matplotlib.figure import Figure  # noqa: PLC0415  pyplot would look for a screen

    names = []
    with mpl.rc_context(_STYLE):
        figure = Figure(layout="constrained")
        scenario.draw(figure, result.rows)
        figure.suptitle(result.title, fontweight="bold")
        figure.supxlabel(_footer(document), fontsize=8, color="#666666")
        for suffix in formats:
            name = f"{result.name}.{suffix}"
            metadata = {"Date": None} if suffix == "svg" else None
            figure.savefig(folder / name, dpi=150, metadata=metadata)
            names.append(name)
    return names


def _footer(document: Document) -> str:
    machine, versions = document.machine, document.versions
    return (
        f"{machine.cpu}, {machine.n_cores} cores{', AMX' if machine.has_amx else ''} · {document.model.file}\n"
        f"wasi-nn-backend {versions.get('wasi-nn-backend')}, llama.cpp {versions.get('llama.cpp')} · "
        f"{document.started:%Y-%m-%d}"
    )


def grouped_bars(axes: Axes, labels: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> None:
    """A group of bars for each label, a bar of it for each series; values that are missing have none."""
    width = 0.82 / len(series)
    for number, (name, values) in enumerate(series.items()):
        offset = (number - (len(series) - 1) / 2) * width
        places = [at + offset for at, value in enumerate(values) if value is not None]
        heights = [value for value in values if value is not None]
        bars = axes.bar(places, heights, width * 0.94, label=name, color=_COLOURS[number % len(_COLOURS)])
        texts = [f"{height:,.0f}" if height >= 100 else f"{height:.3g}" for height in heights]
        axes.bar_label(bars, texts, fontsize=8 if len(series) * len(labels) <= 12 else 7, padding=1)
    axes.set_xticks(range(len(labels)), labels)
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.25)


def stacked_bars(
    axes: Axes, labels: Sequence[str], parts: Mapping[str, Sequence[float]], remarks: Sequence[str]
) -> None:
    """A horizontal bar for each label, the first on top, with a remark at its end."""
    ends = [0.0] * len(labels)
    for number, (name, values) in enumerate(parts.items()):
        axes.barh(range(len(labels)), values, 0.6, ends, label=name, color=_COLOURS[number % len(_COLOURS)])
        ends = [end + value for end, value in zip(ends, values, strict=True)]
    for at, (end, remark) in enumerate(zip(ends, remarks, strict=True)):
        axes.annotate(remark, (end, at), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    _finish_horizontal(axes, labels)
    axes.margins(x=0.22)
    axes.legend(frameon=False, ncols=len(parts), loc="lower left", bbox_to_anchor=(0, 1))


def bars_against_bounds(axes: Axes, labels: Sequence[str], values: Sequence[float], bounds: Sequence[float]) -> None:
    """A horizontal bar for each value as a part of what it may be at most; a line shows where that is."""
    shares = [value / bound for value, bound in zip(values, bounds, strict=True)]
    colours = [_MET if share <= 1 else _MISSED for share in shares]
    bars = axes.barh(range(len(labels)), shares, 0.6, color=colours)
    texts = [f"{value:.3g} (at most {bound:g})" for value, bound in zip(values, bounds, strict=True)]
    background = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # the line runs behind
    axes.bar_label(bars, texts, padding=4, fontsize=9, bbox=background)
    axes.axvline(1.0, color="black", linewidth=1, linestyle="--")
    _finish_horizontal(axes, labels)
    axes.set_xlim(0, 1.45 * max(1.0, *shares))
    axes.set_xlabel("part of the bound (dashed line: the bound)")


def _finish_horizontal(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), [textwrap.fill(label, _N_LABEL_CHARS) for label in labels])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
