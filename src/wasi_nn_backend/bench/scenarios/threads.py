"""The automatic number of threads against fixed ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from wasi_nn_backend.bench import threads
from wasi_nn_backend.bench.document import Column, Row, Target
from wasi_nn_backend.bench.plots import grouped_bars
from wasi_nn_backend.bench.scenario import Options, Scenario
from wasi_nn_backend.registry import model_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SCENARIO"]

_N_TOKENS = 32
_BUSY = (0, 1, 2)
_QUIET_MIN, _BUSY_MIN = 0.95, 0.9


def _measure(options: Options) -> Iterator[Row]:
    n_sequences, n_rounds = ([8], 3) if options.is_quick else ([8, 1], 4)
    own = threads.Options(model_path(options.model_name), _N_TOKENS, sorted({1, options.n_threads}), n_rounds)
    for n in n_sequences:
        for measured in threads.measure_all(own, n, _BUSY):
            rates = dict(measured["tokens_per_s"])
            auto = rates.pop("auto")
            best = max(rates, key=lambda name: float(rates[name]))
            yield Row(
                values={
                    "n_sequences": n,
                    "n_busy": measured["n_busy"],
                    "auto_tokens_per_s": auto,
                    "best_fixed": best,
                    "best_fixed_tokens_per_s": rates[best],
                    "auto_to_best": measured["auto_to_best"],
                },
                details=measured,
            )


def _targets(rows: Sequence[Row], _has_amx: bool) -> list[Target]:
    return [
        Target.of(
            f"automatic / best fixed, {_place(row)}",
            row.details["auto_to_best"],
            "at least",
            _BUSY_MIN if row.details["n_busy"] else _QUIET_MIN,
        )
        for row in rows
    ]


def _place(row: Row) -> str:
    beside = f"beside {row.values['n_busy']} busy" if row.values["n_busy"] else "quiet"
    return f"{row.values['n_sequences']} sequence{'s' * (row.values['n_sequences'] != 1)}, {beside}"


def _draw(figure: Figure, rows: Sequence[Row]) -> None:
    figure.set_size_inches(2.4 + 1.9 * len(rows), 4.2)
    axes = figure.add_subplot()
    names = sorted(
        rows[0].details["tokens_per_s"], key=lambda name: name != "auto"
    )  # what is judged has the first colour
    rates = [row.details["tokens_per_s"] for row in rows]
    labels = [_place(row).replace(", ", "\n") for row in rows]
    grouped_bars(axes, labels, {name: [each[name] for each in rates] for name in names})
    axes.set_ylabel("tokens per second, all sequences together")
    axes.legend(frameon=False)


SCENARIO = Scenario(
    name="threads",
    title="The automatic number of threads",
    shows="How the number of threads that the engine finds while it runs compares with fixed numbers, quiet and beside "
    "one and two processes that compute all the time.",
    method="All run at the same time and take turns within a round; none may warm up, since adapting counts. "
    "The ratio is to the fixed number that the automatic one comes off worst against. Whatever else the machine does "
    "counts as one more busy process.",
    command="python -m wasi_nn_backend.bench.threads",
    quick_s_max=60,
    columns=[
        Column(key="n_sequences", heading="sequences", meaning="sequences that generate at the same time"),
        Column(key="n_busy", heading="busy processes", meaning="processes that compute all the time beside them"),
        Column(key="auto_tokens_per_s", heading="automatic, t/s", meaning="tokens/s, threads=auto", format=".1f"),
        Column(key="best_fixed", heading="best fixed", meaning="the fixed number of threads with the best median"),
        Column(
            key="best_fixed_tokens_per_s",
            heading="best fixed, t/s",
            meaning="tokens per second with that number",
            format=".1f",
        ),
        Column(
            key="auto_to_best",
            heading="automatic / best",
            meaning="the least, over fixed numbers, of the median of the rounds' ratios",
            format=".3f",
        ),
    ],
    measure=_measure,
    targets=_targets,
    draw=_draw,
)
