"""What the engine's own work adds to a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from wasi_nn_backend.bench import overhead
from wasi_nn_backend.bench.document import Column, Row, Target
from wasi_nn_backend.bench.plots import stacked_bars
from wasi_nn_backend.bench.scenario import Options, Scenario
from wasi_nn_backend.registry import model_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SCENARIO"]

_PARTS = {"decode_ms": "llama_decode", "sampling_ms": "sampling", "engine_ms": "engine"}
#: (sequences, generated tokens of each, rounds)
_QUICK = ([1, 4, 16], 32, 3)
_FULL = ([1, 4, 16, 32], 64, 4)


def _measure(options: Options) -> Iterator[Row]:
    n_sequences, n_tokens, n_rounds = _QUICK if options.is_quick else _FULL
    for n in n_sequences:
        yield Row(values={**overhead.measure(model_path(options.model_name), n, n_tokens, n_rounds)})


def _targets(rows: Sequence[Row], _has_amx: bool) -> list[Target]:
    return [
        Target.of(
            f"the engine's share at {overhead.N_SEQUENCES_JUDGED} sequences",
            row.number("share"),
            "below",
            overhead.SHARE_MAX,
        ).model_copy(update={"format": ".2%"})
        for row in rows
        if row.values["n_sequences"] == overhead.N_SEQUENCES_JUDGED
    ]


def _draw(figure: Figure, rows: Sequence[Row]) -> None:
    figure.set_size_inches(7.2, 1.6 + 0.5 * len(rows))
    axes = figure.add_subplot()
    stacked_bars(
        axes,
        [f"{(n := row.values['n_sequences'])} sequence{'s' * (n != 1)}" for row in rows],
        {label: [row.number(key) for row in rows] for key, label in _PARTS.items()},
        [f"engine {float(row.values['share'] or 0):.1%}" for row in rows],
    )
    axes.set_xlabel("milliseconds of a step (medians)")


SCENARIO = Scenario(
    name="overhead",
    title="The engine's own share of a step",
    shows="What of a step is neither llama_decode nor sampling: planning, bookkeeping, text, threads.",
    method="A step lasts from one llama_decode to the next while all sequences generate, greedily, which is the "
    "shortest sampling there is. The timers themselves count as the engine's time. Medians over all steps.",
    command="python -m wasi_nn_backend.bench.overhead",
    quick_s_max=40,
    columns=[
        Column(key="n_sequences", heading="sequences", meaning="sequences that generate at the same time"),
        Column(key="n_steps", heading="", meaning="steps that were measured"),
        Column(key="step_ms", heading="step, ms", meaning="milliseconds of a step", format=".2f"),
        *(
            Column(key=key, heading=f"{label}, ms", meaning=f"milliseconds of a step in: {label}", format=".2f")
            for key, label in _PARTS.items()
        ),
        Column(key="share", heading="engine's share", meaning="the engine's part of a step", format=".2%"),
    ],
    measure=_measure,
    targets=_targets,
    draw=_draw,
)
