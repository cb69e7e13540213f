"""What is going on in a backend, as plain data: ``dataclasses.asdict`` makes JSON of it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from wasi_nn_backend.context_lifetime import ContextState
from wasi_nn_backend.engine import EngineLease, EngineStatistics, EngineStore
from wasi_nn_backend.errors import WasiNNError
from wasi_nn_backend.execution_context import ExecutionContext
from wasi_nn_backend.graph import Graph
from wasi_nn_backend.tasks import TaskBook, TaskTotals

__all__ = ["BackendStatus", "GraphStatus", "SessionStatus", "read_status"]


@dataclass(frozen=True, slots=True)
class GraphStatus:
    """``model`` is the file's path. ``n_queued`` and ``n_running`` count its sessions. Graphs under equal settings
    share an engine: their ``engine`` is the same."""

    name: str
    model: str
    n_sessions: int
    n_queued: int
    n_running: int
    engine: EngineStatistics


@dataclass(frozen=True, slots=True)
class SessionStatus:
    """``id`` is the context's number, ``session_id`` its name or empty. ``age_s`` counts from its making, ``idle_s``
    from its last use. ``n_tokens_cached`` are in the KV cache or in host memory."""

    id: int
    session_id: str
    graph: str
    state: ContextState
    age_s: float
    idle_s: float
    n_tokens_cached: int


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """``engines`` are those of the graphs, each once, and those that contexts with settings of their own have.
    ``tasks`` counts since the backend began, by graph. ``now_s`` is the backend's clock: rates need a difference of it.
    """

    graphs: tuple[GraphStatus, ...]
    sessions: tuple[SessionStatus, ...]
    n_queued: int
    n_running: int
    engines: tuple[EngineStatistics, ...]
    tasks: tuple[TaskTotals, ...]
    now_s: float


def read_status(graphs: Iterable[Graph], store: EngineStore, tasks: TaskBook, now_s: float) -> BackendStatus:
    """Each graph and session as it is when it is looked at. A graph that is unloaded meanwhile is left out."""
    totals = tasks.totals()  # first, at the time that is told: engines answer only between two steps
    graph_rows, session_rows = [], []
    for graph in graphs:
        try:
            engine = graph.statistics()
        except WasiNNError:  # unloaded meanwhile
            continue
        contexts = graph.contexts()
        n_tokens_cached = _n_tokens_cached(contexts)
        rows = [_session_status(context, n_tokens_cached.get(context.id, 0), now_s) for context in contexts]
        session_rows += rows
        graph_rows.append(
            GraphStatus(
                name=graph.name,
                model=str(graph.path),
                n_sessions=len(rows),
                n_queued=_count(rows, "queued"),
                n_running=_count(rows, "running"),
                engine=engine,
            )
        )
    graph_rows.sort(key=lambda row: row.name)
    session_rows.sort(key=lambda row: row.id)
    return BackendStatus(
        graphs=tuple(graph_rows),
        sessions=tuple(session_rows),
        n_queued=_count(session_rows, "queued"),
        n_running=_count(session_rows, "running"),
        engines=_engines(graph_rows, store),
        tasks=totals,
        now_s=now_s,
    )


def _engines(graphs: Iterable[GraphStatus], store: EngineStore) -> tuple[EngineStatistics, ...]:
    found = {row.engine.id: row.engine for row in graphs if row.engine.id}  # 0: a graph that only gives vectors
    others = store.statistics(besides=found)
    return tuple(sorted((*found.values(), *others), key=lambda row: row.id))


def _n_tokens_cached(contexts: Iterable[ExecutionContext]) -> dict[int, int]:
    """By context. Each engine is asked once: it answers between two steps."""
    leases: dict[Hashable, EngineLease] = {}
    session_ids: dict[Hashable, list[int]] = {}
    for context in contexts:
        if (lease := context.lease) is not None:
            leases[lease.key] = lease
            session_ids.setdefault(lease.key, []).append(context.id)
    found: dict[int, int] = {}
    for key, lease in leases.items():
        with suppress(WasiNNError):  # closed meanwhile
            found |= lease.n_tokens_cached(session_ids[key])
    return found


def _session_status(context: ExecutionContext, n_tokens_cached: int, now_s: float) -> SessionStatus:
    state = context.state
    return SessionStatus(
        id=context.id,
        session_id=context.session_id,
        graph=context.graph.name,
        state=state,
        age_s=max(0.0, now_s - context.created_s),
        idle_s=max(0.0, now_s - context.last_used_s) if state == "idle" else 0.0,
        n_tokens_cached=n_tokens_cached,
    )


def _count(rows: list[SessionStatus], state: ContextState) -> int:
    return sum(row.state == state for row in rows)
