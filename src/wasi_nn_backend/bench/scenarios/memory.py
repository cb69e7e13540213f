"""What the KV memory's promises cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from wasi_nn_backend.bench import memory
from wasi_nn_backend.bench.document import Column, Row, Target, Value
from wasi_nn_backend.bench.engine import show_progress
from wasi_nn_backend.bench.plots import bars_against_bounds
from wasi_nn_backend.bench.scenario import Options, Scenario

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SCENARIO"]

_N_SESSIONS = 16
#: Figure -> (what it is, what it may be at most).
_FIGURES = {
    "conversation": ("first token of turn 10 / of turn 2 of a conversation", 1.5),
    "shared_prompt": (f"{_N_SESSIONS} first tokens with one system prompt / computing it {_N_SESSIONS} times", 0.2),
    "beside_10_idle": ("a step beside 10 idle sessions of 500 tokens / beside none", 1.05),
    "beside_100_idle": ("a step beside 100 idle sessions of 500 tokens / beside none", 1.05),
    "back_from_host_memory": ("a session back from host memory / computed again", 0.1),
}
_N_COMPUTED = f"prompt tokens computed for {_N_SESSIONS} sessions / the system prompt and each one's own"


def _measure(options: Options) -> Iterator[Row]:
    for measure in (memory.conversation, memory.shared_prompt, memory.idle_sessions, memory.returning_session):
        show_progress(measure.__name__.replace("_", " "))
        _, figures = measure(options.model_name)
        for name, value in figures.items():
            if name in _FIGURES:
                text, bound = _FIGURES[name]
                yield Row(values={"figure": name, "what": text, "value": value, "bound": bound}, details=figures)
        if "shared_prompt" in figures:
            yield Row(values=_computed(figures), details=figures)


def _computed(figures: Mapping[str, float]) -> dict[str, Value]:
    """Of the system prompt once and each session's own words: 1 is what there is to compute."""
    n_own = figures["shared_prompt_tokens_own"]
    n_needed = figures["shared_prompt_tokens"] - n_own + _N_SESSIONS * n_own
    value = figures["shared_prompt_tokens_computed"] / n_needed
    return {"figure": "shared_prompt_tokens", "what": _N_COMPUTED, "value": value, "bound": 1.0}


def _targets(rows: Sequence[Row], _has_amx: bool) -> list[Target]:
    return [Target.of(str(row.values["what"]), row.number("value"), "at most", row.number("bound")) for row in rows]


def _draw(figure: Figure, rows: Sequence[Row]) -> None:
    figure.set_size_inches(8.6, 1.4 + 0.55 * len(rows))
    bars_against_bounds(
        figure.add_subplot(),
        [str(row.values["what"]) for row in rows],
        [row.number("value") for row in rows],
        [row.number("bound") for row in rows],
    )


SCENARIO = Scenario(
    name="memory",
    title="KV memory: conversations, shared prompts, idle and returning sessions",
    shows="That a conversation's history is not computed again, a system prompt once for all sessions that start with "
    "it, that idle sessions do not slow others down, and what bringing one back from host memory costs.",
    method="Each figure is a ratio of two times of this run, or of two numbers of tokens. Conversations are measured "
    "three times, steps beside idle sessions and returns four times (the first step is not counted); medians.",
    command="python -m wasi_nn_backend.bench.memory",
    quick_s_max=150,
    columns=[
        Column(key="figure", heading="", meaning="the figure's name"),
        Column(key="what", heading="ratio", meaning="what is divided by what"),
        Column(key="value", heading="measured", meaning="the ratio", format=".3f"),
        Column(key="bound", heading="at most", meaning="what it is to be at most", format=".2f"),
    ],
    measure=_measure,
    targets=_targets,
    draw=_draw,
)
