"""A light user beside a user with many long requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from wasi_nn_backend.bench import fairness
from wasi_nn_backend.bench.document import Column, Row, Target
from wasi_nn_backend.bench.plots import grouped_bars
from wasi_nn_backend.bench.raw_loop import RawLoop
from wasi_nn_backend.bench.scenario import Options, Scenario
from wasi_nn_backend.bench.workload import PromptMaker
from wasi_nn_backend.registry import model_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SCENARIO"]

_RATIO_MAX = 2.0
_TIMES = {"alone_ms": "alone", "beside_ms": "beside 50 long requests"}


def _measure(options: Options) -> Iterator[Row]:
    own = fairness.Options(
        path=model_path(options.model_name),
        n_heavy=50,
        n_heavy_prompt=120 if options.is_quick else 300,
        n_heavy_answer=60 if options.is_quick else 200,
        n_light_prompt=60,
        n_places=10,
        n_rounds=1 if options.is_quick else 3,
        n_samples=8,
    )
    with RawLoop(own.path, n_sequences=1, n_ctx=256, n_threads=1) as tokenizer:
        prompts = fairness.Prompts(PromptMaker(tokenizer.tokenize))
        for is_fair in (True, False):
            measured = fairness.measure(own, prompts, is_fair=is_fair)
            keys = ("is_fair", "alone_ms", "beside_ms", "ratio_median")
            yield Row(values={key: measured[key] for key in keys}, details=measured)


def _targets(rows: Sequence[Row], _has_amx: bool) -> list[Target]:
    fair = [row.number("ratio_median") for row in rows if row.values["is_fair"]]
    unfair = [row.number("ratio_median") for row in rows if not row.values["is_fair"]]
    name = "first token beside a user with 50 requests / alone"
    targets = [Target.of(f"{name}, fair scheduling", ratio, "at most", _RATIO_MAX) for ratio in fair]
    if fair and unfair:
        targets.append(Target.of(f"{name}, without fair scheduling", unfair[0], "above", fair[0]))
    return targets


def _draw(figure: Figure, rows: Sequence[Row]) -> None:
    figure.set_size_inches(6.4, 4.2)
    axes = figure.add_subplot()
    grouped_bars(
        axes,
        ["fair scheduling" if row.values["is_fair"] else "without" for row in rows],
        {label: [row.number(key) for row in rows] for key, label in _TIMES.items()},
    )
    axes.set_yscale("log")  # without fair scheduling it is some hundred times as long
    axes.set_ylabel("milliseconds to the first token (medians)")
    axes.legend(frameon=False)


SCENARIO = Scenario(
    name="fairness",
    title="A light user beside a heavy one",
    shows="How long a user with one short request waits for its first token while another has 50 long ones in the "
    "system, with and without fair scheduling, against an empty queue.",
    method="The heavy user's requests keep every place in the batch taken. The light user's come while prompts and "
    "answers are computed, each with a prompt that nothing in the cache begins with. Both kinds of rounds take turns; "
    "medians.",
    command="python -m wasi_nn_backend.bench.fairness",
    quick_s_max=80,
    columns=[
        Column(key="is_fair", heading="fair scheduling", meaning="whether backend.fair_scheduling_enabled is on"),
        *(
            Column(key=key, heading=f"{label}, ms", meaning=f"milliseconds to the first token, {label}", format=".0f")
            for key, label in _TIMES.items()
        ),
        Column(key="ratio_median", heading="ratio", meaning="the median of the rounds' ratios", format=".2f"),
    ],
    measure=_measure,
    targets=_targets,
    draw=_draw,
)
