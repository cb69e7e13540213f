"""Many sessions that generate, against the plain loop and other libraries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wasi_nn_backend.bench import sessions
from wasi_nn_backend.bench.document import Column, Row, Target, Value
from wasi_nn_backend.bench.peers import PEERS, missing_peers
from wasi_nn_backend.bench.plots import grouped_bars
from wasi_nn_backend.bench.scenario import Options, Scenario
from wasi_nn_backend.registry import model_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SCENARIO"]

#: (sessions, lengths of context, rounds)
_QUICK = ([1, 4, 16], [50, 1000], 2)
_FULL = ([1, 4, 8, 16, 32], [50, 500, 1000], 3)
_N_TOKENS = 64
#: With more groups of bars the contexts are drawn one below the other.
_N_GROUPS_BESIDE = 6
#: Contender -> the beginning of its columns' keys.
_KEYS = {"engine": "engine", "raw": "raw", "xllamacpp": "xllamacpp", "llama-cpp-python": "llama_cpp_python"}
_LABELS = {"raw": "plain loop"}


def _columns() -> list[Column]:
    rates = [
        Column(
            key=f"{key}_tokens_per_s",
            heading=f"{_LABELS.get(name, name)}, t/s",
            meaning=f"tokens per second of all sessions together, {_LABELS.get(name, name)}: the rounds' median",
            format=".1f",
        )
        for name, key in _KEYS.items()
    ]
    ratios = [
        Column(
            key=f"engine_to_{key}",
            heading=f"engine / {_LABELS.get(name, name)}",
            meaning=f"the median of the rounds' ratios of the engine to {_LABELS.get(name, name)}",
            format=".2f",
        )
        for name, key in _KEYS.items()
        if name != "engine"
    ]
    return [
        Column(key="n_sessions", heading="sessions", meaning="sessions that generate at the same time"),
        Column(key="n_context", heading="context", meaning="tokens of each session's prompt"),
        *rates,
        *ratios,
        Column(
            key="raw_setting",
            heading="plain loop's best setting",
            meaning="KV layout, attention and threads that were fastest for the plain loop in trials",
        ),
    ]


def _measure(options: Options) -> Iterator[Row]:
    n_sessions, n_context, n_rounds = _QUICK if options.is_quick else _FULL
    missing = missing_peers()
    peers = [name for name in PEERS if options.with_peers and name not in missing]
    own = sessions.Options(model_path(options.model_name), n_rounds, options.n_threads, peers)
    points = sorted(
        sessions.grid(n_sessions, n_context, _N_TOKENS), key=lambda point: point.n_context
    )  # cheapest first
    for measured in sessions.measure_all(points, own):
        yield Row(values=_values(measured), details=measured)


def _values(measured: Mapping[str, Any]) -> dict[str, Value]:
    rates, ratios = measured["tokens_per_s"], measured["ratios"]
    return {
        **{key: measured[key] for key in ("n_sessions", "n_context", "raw_setting")},
        **{f"{key}_tokens_per_s": rates.get(name) for name, key in _KEYS.items()},
        **{
            f"engine_to_{key}": ratios[name]["median"] if name in ratios else None
            for name, key in _KEYS.items()
            if name != "engine"
        },
    }


def _targets(rows: Sequence[Row], has_amx: bool) -> list[Target]:
    least = min(rows, key=lambda row: row.details["ratios"]["raw"]["median"])
    ratio = least.details["ratios"]["raw"]["median"]
    targets = [Target.of(f"engine / plain loop, the least ({_place(least)})", ratio, "at least", 0.95)]
    with_peers = [(row, each) for row in rows if (each := _to_better_peer(row)) is not None]
    many = [(row, each) for row, each in with_peers if row.number("n_sessions") >= 4]
    if many:
        least, ratio = min(many, key=lambda pair: pair[1])
        targets.append(Target.of(f"engine / better peer, the least ({_place(least)})", ratio, "above", 1.0))
    for n_context, bound in ((50, 2.0), (1000, 1.7)):
        for row, ratio in with_peers:
            if (row.values["n_sessions"], row.values["n_context"]) == (16, n_context):
                target = Target.of(f"engine / better peer at {_place(row)}", ratio, "at least", bound)
                targets.append(target.under("a CPU with AMX", holds=has_amx))
    return targets


def _to_better_peer(row: Row) -> float | None:
    ratios = row.details["ratios"]
    return min((ratios[name]["median"] for name in PEERS if name in ratios), default=None)


def _place(row: Row) -> str:
    return f"{row.values['n_sessions']} x {row.values['n_context']} tokens"


def _draw(figure: Figure, rows: Sequence[Row]) -> None:
    contexts = sorted({row.details["n_context"] for row in rows})
    names = [name for name in _KEYS if any(name in row.details["tokens_per_s"] for row in rows)]
    n_rows, n_columns = (1, len(contexts)) if len(rows) <= _N_GROUPS_BESIDE else (len(contexts), 1)
    figure.set_size_inches((5.2 if n_rows == 1 else 9.0) * n_columns + 0.6, 4.2 * n_rows + 0.4)
    for number, n_context in enumerate(contexts, 1):
        here = [row for row in rows if row.details["n_context"] == n_context]
        axes = figure.add_subplot(n_rows, n_columns, number)
        grouped_bars(
            axes,
            [str(row.details["n_sessions"]) for row in here],
            {_LABELS.get(name, name): [row.details["tokens_per_s"].get(name) for row in here] for name in names},
        )
        axes.set_title(f"{n_context:,} tokens of context")
        axes.set_xlabel("sessions")
        axes.set_ylabel("tokens per second, all sessions together")
        if number == 1:
            axes.legend(frameon=False)


SCENARIO = Scenario(
    name="sessions",
    title="Many sessions at once",
    shows="How fast 1 to 32 sessions generate together, against a plain llama.cpp loop in its best setting for each "
    "line, llama-server's engine (xllamacpp) and llama-cpp-python's class Llama.",
    method="What counts is the time in which all sessions generate. Prompts are computed before, and "
    "are each session's own. All generate as many tokens, greedily and past the model's end. Contenders take "
    "turns within a round; peers run in processes of their own.",
    command="python -m wasi_nn_backend.bench.sessions",
    quick_s_max=430,
    columns=_columns(),
    measure=_measure,
    targets=_targets,
    draw=_draw,
    has_peers=True,
)
