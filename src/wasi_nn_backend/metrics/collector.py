"""One Prometheus collector over the status of backends and their finished tasks.

Counts and gauges are read from the status when somebody asks. Only distributions have to be kept up to date, which the
backends' finished tasks do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from wasi_nn_backend.backend import Backend
from wasi_nn_backend.engine import EngineStatistics
from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.status import BackendStatus
from wasi_nn_backend.tasks import FinishedTask, TaskTotals

__all__ = ["MetricsCollector", "as_named"]

_PREFIX: Final = "wasi_nn_"
_STATES: Final = ("idle", "queued", "running")

# Upper bounds in seconds. From a cached prompt on a fast machine to the longest time-out that can be configured.
_WAIT_BUCKETS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_DURATION_BUCKETS: Final = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)

_Family = type[CounterMetricFamily] | type[GaugeMetricFamily]


@dataclass(frozen=True, slots=True)
class _EngineMetric:
    family: _Family
    name: str
    documentation: str
    value: Callable[[EngineStatistics], float]


_ENGINE_METRICS: Final = (
    _EngineMetric(
        GaugeMetricFamily, "queued_requests", "Requests that wait for a place in the batch.", lambda e: e.n_waiting
    ),
    _EngineMetric(
        GaugeMetricFamily, "running_requests", "Requests that have a place in the batch.", lambda e: e.n_running
    ),
    _EngineMetric(
        GaugeMetricFamily, "batch_places", "How many requests can run at the same time.", lambda e: e.n_sequences
    ),
    _EngineMetric(
        GaugeMetricFamily,
        "batch_occupancy_ratio",
        "Share of the batch's places that are taken.",
        lambda e: e.n_running / e.n_sequences if e.n_sequences else 0.0,
    ),
    _EngineMetric(GaugeMetricFamily, "kv_cells", "Tokens that the KV cache can hold.", lambda e: e.n_cells),
    _EngineMetric(GaugeMetricFamily, "kv_used_cells", "Tokens that the KV cache holds.", lambda e: e.n_cells_used),
    _EngineMetric(
        GaugeMetricFamily, "host_sessions", "Sessions whose tokens lie in host memory.", lambda e: e.n_sessions_in_host
    ),
    _EngineMetric(CounterMetricFamily, "steps", "Decodes of a batch.", lambda e: e.n_steps),
    _EngineMetric(
        CounterMetricFamily,
        "step_sequences",
        "Sequences in all batches; divided by the steps, the mean batch.",
        lambda e: e.n_sequence_steps,
    ),
    _EngineMetric(
        CounterMetricFamily,
        "step_tokens",
        "Tokens in all batches, of prompts and generated ones.",
        lambda e: e.n_tokens_decoded,
    ),
    _EngineMetric(
        CounterMetricFamily,
        "evicted_tokens",
        "Cached tokens that had to make room for others.",
        lambda e: e.n_tokens_evicted,
    ),
)
_TASK_METRICS: Final[tuple[tuple[str, str, Callable[[TaskTotals], int]], ...]] = (
    ("prompt_tokens", "Tokens of the prompts of requests that are over.", lambda t: t.n_tokens_prompt),
    ("cached_tokens", "Those of them that were in the KV cache already.", lambda t: t.n_tokens_cached),
    ("computed_tokens", "Tokens that went through the model.", lambda t: t.n_tokens_computed),
    ("generated_tokens", "Tokens of generated text, as they come.", lambda t: t.n_tokens_generated),
)


def as_named(backends: Backend | Mapping[str, Backend]) -> dict[str, Backend]:
    """A single backend has an empty name. Raises ``InvalidArgument`` for anything else than backends."""
    named: dict[Any, Any] = dict(backends) if isinstance(backends, Mapping) else {"": backends}
    for name, backend in named.items():
        if not isinstance(name, str) or not isinstance(backend, Backend):
            raise InvalidArgument(
                f"metrics are those of a Backend, or of a mapping of names to backends; got {type(backend).__name__}"
            )
    return named


class MetricsCollector:
    """For a ``prometheus_client.CollectorRegistry`` of one's own; ``serve_metrics`` has one ready.

    ``backends`` is a backend, or several by name: then each series has a label ``backend``. Distributions count from
    here on, everything else from the backend's beginning. Each collection asks the engines, which answer between two
    steps. ``close`` ends the counting.
    """

    def __init__(self, backends: Backend | Mapping[str, Backend]) -> None:
        self._backends = as_named(backends)
        self._own_labels = ("backend",) if isinstance(backends, Mapping) else ()
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From submission to the first token.", ("graph",), _WAIT_BUCKETS
        )
        self._wait = self._histogram(
            "queue_wait_seconds", "From submission to a place in the batch.", ("graph", "priority"), _WAIT_BUCKETS
        )
        self._duration = self._histogram(
            "request_duration_seconds", "From submission to the end.", ("graph", "kind"), _DURATION_BUCKETS
        )
        self._listeners = [
            (backend, self._listener(self._own_values(name))) for name, backend in self._backends.items()
        ]
        for backend, listener in self._listeners:
            backend.tasks.subscribe(listener)

    def close(self) -> None:
        """Idempotent."""
        for backend, listener in self._listeners:
            backend.tasks.unsubscribe(listener)

    def describe(self) -> Iterable[Metric]:
        """Names without samples, which a registry asks for so that no engine has to be asked for them."""
        return [*self._families({}), *(each for one in self._histograms for each in one.describe())]

    def collect(self) -> Iterator[Metric]:
        yield from self._families({name: backend.status() for name, backend in self._backends.items()})
        for histogram in self._histograms:
            yield from histogram.collect()

    # Distributions.

    @property
    def _histograms(self) -> tuple[Histogram, ...]:
        return self._first_token, self._wait, self._duration

    def _histogram(self, name: str, documentation: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
        return Histogram(_PREFIX + name, documentation, (*self._own_labels, *labels), buckets=buckets, registry=None)

    def _listener(self, own: Sequence[str]) -> Callable[[FinishedTask], None]:
        def observe(task: FinishedTask) -> None:
            identity, figures = task.identity, task.figures
            graph = _text(identity.graph)
            if figures.waited_s is not None:
                self._wait.labels(*own, graph, identity.priority).observe(figures.waited_s)
            if figures.first_token_s is not None:
                self._first_token.labels(*own, graph).observe(figures.first_token_s)
            if task.was_accepted:
                self._duration.labels(*own, graph, identity.kind).observe(figures.duration_s)

        return observe

    # What is read from the status.

    def _own_values(self, name: str) -> tuple[str, ...]:
        return (_text(name),) if self._own_labels else ()

    def _families(self, statuses: Mapping[str, BackendStatus]) -> Iterator[Metric]:
        of_each = [(self._own_values(name), status) for name, status in statuses.items()]
        yield self._sessions(of_each)
        yield self._requests(of_each)
        for name, documentation, total in _TASK_METRICS:
            family = self._family(CounterMetricFamily, name, documentation, "graph")
            for own, status in of_each:
                by_graph: Counter[str] = Counter()
                for row in status.tasks:
                    by_graph[row.graph] += total(row)
                for graph, value in by_graph.items():
                    family.add_metric((*own, _text(graph)), value)
            yield family
        for metric in _ENGINE_METRICS:
            family = self._family(metric.family, metric.name, metric.documentation, "engine", "model")
            for own, status in of_each:
                for engine in status.engines:
                    family.add_metric((*own, *_engine_labels(engine)), metric.value(engine))
            yield family
        yield self._kv_bytes(of_each)

    def _sessions(self, of_each: Sequence[tuple[tuple[str, ...], BackendStatus]]) -> Metric:
        family = self._family(GaugeMetricFamily, "sessions", "Open sessions by what they do.", "graph", "state")
        for own, status in of_each:
            n_sessions = Counter((row.graph, row.state) for row in status.sessions)
            for graph in sorted({row.name for row in status.graphs}):
                for state in _STATES:
                    family.add_metric((*own, _text(graph), state), n_sessions[graph, state])
        return family

    def _requests(self, of_each: Sequence[tuple[tuple[str, ...], BackendStatus]]) -> Metric:
        family = self._family(
            CounterMetricFamily, "requests", "Requests that are over, by why they ended.", "graph", "kind", "reason"
        )
        for own, status in of_each:
            for row in status.tasks:
                for reason, n_requests in row.n_by_reason.items():
                    family.add_metric((*own, _text(row.graph), row.kind, reason), n_requests)
        return family

    def _kv_bytes(self, of_each: Sequence[tuple[tuple[str, ...], BackendStatus]]) -> Metric:
        family = self._family(
            GaugeMetricFamily,
            "kv_bytes",
            "Memory of sessions' tokens: cache is what the KV cache takes, used or not, host what left it.",
            "engine",
            "model",
            "tier",
        )
        for own, status in of_each:
            for engine in status.engines:
                labels = (*own, *_engine_labels(engine))
                family.add_metric((*labels, "cache"), engine.n_kv_bytes)
                family.add_metric((*labels, "host"), engine.n_host_bytes)
        return family

    def _family(
        self, kind: _Family, name: str, documentation: str, *labels: str
    ) -> CounterMetricFamily | GaugeMetricFamily:
        return kind(_PREFIX + name, documentation, labels=(*self._own_labels, *labels))


def _engine_labels(engine: EngineStatistics) -> tuple[str, str]:
    """The file's name without its folder: paths are long, and say more of a machine than a scrape has to."""
    return str(engine.id), _text(Path(engine.model).name)


def _text(name: str) -> str:
    """Names of files need not be UTF-8; one that is not would spoil the whole answer."""
    return name.encode(errors="backslashreplace").decode()
