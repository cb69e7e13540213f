"""What a scenario of ``wasi-nn bench`` is: something to measure, what it ought to give, and how it is drawn."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wasi_nn_backend.bench.document import Column, Row, Target
from wasi_nn_backend.errors import InvalidArgument

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SCENARIOS", "Options", "Scenario", "load_scenario"]

#: Name -> the module that has it as ``SCENARIO``, in the order in which they run. A new one gets a line here.
SCENARIOS = {
    "sessions": "wasi_nn_backend.bench.scenarios.sessions",
    "overhead": "wasi_nn_backend.bench.scenarios.overhead",
    "sampling": "wasi_nn_backend.bench.scenarios.sampling",
    "memory": "wasi_nn_backend.bench.scenarios.memory",
    "fairness": "wasi_nn_backend.bench.scenarios.fairness",
    "threads": "wasi_nn_backend.bench.scenarios.threads",
}


@dataclass(frozen=True, slots=True)
class Options:
    """``model`` None: the built-in one, and a second where the scenario has use for it."""

    model: str | None = None
    is_quick: bool = True
    with_peers: bool = True
    n_threads: int = 1

    @property
    def model_name(self) -> str:
        return self.model or "smollm2"


@dataclass(frozen=True, slots=True)
class Scenario:
    """``measure`` yields rows as they are measured, in a process of its own. ``targets`` gets the rows and whether
    llama.cpp uses AMX here; ``draw`` an empty figure of matplotlib's. Neither is called without rows.

    ``quick_s_max``: a quick run is stopped after so many seconds and keeps the rows that it has. All scenarios together
    have to leave a minute of the quarter of an hour that a quick run may take.
    """

    name: str
    title: str
    shows: str
    method: str
    command: str
    quick_s_max: float
    columns: Sequence[Column]
    measure: Callable[[Options], Iterator[Row]]
    targets: Callable[[Sequence[Row], bool], list[Target]]
    draw: Callable[[Figure, Sequence[Row]], None]
    has_peers: bool = False

    def check(self, row: Row) -> None:
        """Raises ``InvalidArgument`` for a row that has other values than the columns say: files keep one form."""
        keys = [column.key for column in self.columns]
        if sorted(row.values) != sorted(keys):
            raise InvalidArgument(f"a row of {self.name} has {sorted(row.values)} in place of {sorted(keys)}")


def load_scenario(module: str) -> Scenario:
    scenario = importlib.import_module(module).SCENARIO
    if not isinstance(scenario, Scenario):
        raise InvalidArgument(f"SCENARIO of {module} is no Scenario")
    return scenario
