"""Sampling the rows of a step, against llama.cpp's chain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from wasi_nn_backend.bench import sampling
from wasi_nn_backend.bench.document import Column, Row, Target
from wasi_nn_backend.bench.plots import grouped_bars
from wasi_nn_backend.bench.scenario import Options, Scenario

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SCENARIO"]

_N_SEQUENCES = 16
_RATIO_MAX = 0.5


def _measure(options: Options) -> Iterator[Row]:
    models = [options.model] if options.model is not None else []
    n_rounds = 16 if options.is_quick else 60
    for measured in sampling.measure_all(models, _N_SEQUENCES, options.n_threads, n_rounds):
        yield Row(values=measured)


def _targets(rows: Sequence[Row], _has_amx: bool) -> list[Target]:
    return [
        Target.of(
            f"samplers / chain, {row.values['sampling']}, vocabulary of {row.number('n_vocab'):,}",
            row.number("ratio"),
            "at most",
            _RATIO_MAX,
        )
        for row in rows
    ]


def _draw(figure: Figure, rows: Sequence[Row]) -> None:
    vocabularies = list(dict.fromkeys(row.values["n_vocab"] for row in rows))
    figure.set_size_inches(5.2 * len(vocabularies) + 0.6, 4.2)
    for number, n_vocab in enumerate(vocabularies, 1):
        here = [row for row in rows if row.values["n_vocab"] == n_vocab]
        axes = figure.add_subplot(1, len(vocabularies), number)
        times = {"sampler_ms": "this package's samplers", "chain_ms": "llama.cpp's chain"}
        grouped_bars(
            axes,
            [str(row.values["sampling"]) for row in here],
            {label: [row.number(key) for row in here] for key, label in times.items()},
        )
        axes.set_title(f"vocabulary of {n_vocab:,}")
        axes.set_ylabel(f"milliseconds for {_N_SEQUENCES} sequences")
        if number == 1:
            axes.legend(frameon=False)


SCENARIO = Scenario(
    name="sampling",
    title="Sampling the rows of a step",
    shows=f"What sampling {_N_SEQUENCES} sequences costs, against llama.cpp's chain called row by row, with "
    "a vocabulary of 49,152 tokens (SmolLM2) and, where it is installed, one of 262,144 (Gemma 3).",
    method="Each round decodes one token a sequence and samples all rows with both; the first of the two is timed, in "
    "turn, so that both find what a decode leaves in the processor's caches. The sampled tokens have to be equal.",
    command="python -m wasi_nn_backend.bench.sampling",
    quick_s_max=80,
    columns=[
        Column(key="model", heading="", meaning="the model's file"),
        Column(key="n_vocab", heading="vocabulary", meaning="tokens in the vocabulary", format=",d"),
        Column(key="sampling", heading="sampling", meaning="the sampling settings' name"),
        Column(key="chain_ms", heading="chain, ms", meaning="milliseconds for all rows, chain", format=".2f"),
        Column(key="sampler_ms", heading="samplers, ms", meaning="milliseconds for all rows, samplers", format=".2f"),
        Column(key="ratio", heading="ratio", meaning="sampler_ms / chain_ms", format=".3f"),
    ],
    measure=_measure,
    targets=_targets,
    draw=_draw,
)
