"""A scenario without a model, for ``wasi-nn bench``. The model's name says what it does after two rows."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from wasi_nn_backend.bench.document import Column, Row, Target
from wasi_nn_backend.bench.engine import show_progress
from wasi_nn_backend.bench.plots import bars_against_bounds, grouped_bars, stacked_bars
from wasi_nn_backend.bench.scenario import Options, Scenario
from wasi_nn_backend.errors import InvalidArgument

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Its name as a module that is run.
MODULE = __name__


def measure(options: Options) -> Iterator[Row]:
    print("a word of a library's on stdout")
    for n in (1, 2):
        show_progress(f"row {n}")
        yield Row(values={"n": n, "speed": n * 1.5, "peer": None, "name": "fake"}, details={"rounds": [n]})
    what = os.path.basename(options.model_name)
    if what == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "fail":
        raise SystemExit("this model has no words")
    elif what == "refuse":
        raise InvalidArgument("this model is none")
    elif what == "other-form":
        yield Row(values={"surprise": 1})
    elif what == "interrupt":  # what a person does at the terminal
        os.kill(os.getppid(), signal.SIGINT)
        threading.Event().wait()
    elif what == "block":
        threading.Event().wait()


def targets(rows: Sequence[Row], has_amx: bool) -> list[Target]:
    speed = rows[-1].number("speed")
    return [
        Target.of("the last speed", speed, "at least", 3.0),
        Target.of("the last speed with AMX", speed, "above", 100).under("a CPU with AMX", holds=has_amx),
    ]


def draw(figure: Figure, rows: Sequence[Row]) -> None:
    speeds = [row.number("speed") for row in rows]
    labels = [str(row.values["n"]) for row in rows]
    grouped_bars(figure.add_subplot(1, 3, 1), labels, {"engine": speeds, "peer": [None, *speeds[1:]]})
    stacked_bars(figure.add_subplot(1, 3, 2), labels, {"a": speeds, "b": speeds}, labels)
    bars_against_bounds(figure.add_subplot(1, 3, 3), labels, speeds, [2.0] * len(speeds))


SCENARIO = Scenario(
    name="fake",
    title="Nothing at all",
    shows="How fast nothing is.",
    method="By counting.",
    command="python -m tests.fakes.scenario",
    quick_s_max=60,
    columns=[
        Column(key="n", heading="number", meaning="a number"),
        Column(key="speed", heading="speed, 1/s", meaning="a speed", format=".2f"),
        Column(key="peer", heading="peer", meaning="what is not installed", format=".2f"),
        Column(key="name", heading="", meaning="in the file only"),
    ],
    measure=measure,
    targets=targets,
    draw=draw,
)
