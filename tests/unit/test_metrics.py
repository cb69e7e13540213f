"""Figures over HTTP: what Prometheus reads is what happened, and the server is a good guest in its process."""

from __future__ import annotations

import json
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.llama import FakeLlama
from wasi_nn_backend import Backend, InvalidArgument, PromptTooLong, RuntimeFailure
from wasi_nn_backend.cli.status_client import StatusSample
from wasi_nn_backend.engine import EngineStatistics
from wasi_nn_backend.metrics import MetricsCollector, MetricsServer, serve_metrics
from wasi_nn_backend.status import GraphStatus, SessionStatus

CONFIG: dict[str, Any] = {
    "sampling": {"temperature": 0, "ignore_eos": True},
    "session": {"prompt_mode": "raw"},
    "stopping": {"max_tokens": 6},
    "model": {"n_ctx": 512},
    "backend": {"max_concurrent": 4},
}

#: Sample name and labels -> value.
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def backend(tiny_model_path: Path) -> Iterator[Backend]:
    with Backend(CONFIG, llama=FakeLlama()) as backend:
        backend.register("model", tiny_model_path)
        yield backend


@pytest.fixture
def server(backend: Backend) -> Iterator[MetricsServer]:
    with serve_metrics(backend, 0) as server:
        yield server


def fetch(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as response:
        return str(response.read().decode())


def scrape(server: MetricsServer) -> Samples:
    families = list(text_string_to_metric_families(fetch(f"{server.url}/metrics")))
    assert len({family.name for family in families}) == len(families), "each family stands there once"
    samples = [sample for family in families for sample in family.samples]
    found = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(found) == len(samples), "no series stands there twice"
    return found


def key(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return f"wasi_nn_{name}", frozenset(labels.items())


def test_what_prometheus_reads_is_what_happened(backend: Backend, server: MetricsServer, tiny_model_path: Path) -> None:
    graph = backend.load_by_name("model")
    context = graph.init_execution_context({"priority": "high"})
    context.run_inference("hello")
    context.run_inference("hello again")
    with pytest.raises(PromptTooLong):
        context.run_inference("x" * 1000)
    found = scrape(server)
    assert found[key("requests_total", graph="model", kind="text", reason="length")] == 2
    assert found[key("requests_total", graph="model", kind="text", reason="refused")] == 1
    assert found[key("generated_tokens_total", graph="model")] == 12
    for name, field in (("prompt", "n_tokens_prompt"), ("cached", "n_tokens_reused"), ("computed", "n_tokens_decoded")):
        assert found[key(f"{name}_tokens_total", graph="model")] == getattr(graph.statistics(), field) > 0
    assert found[key("time_to_first_token_seconds_count", graph="model")] == 2
    assert found[key("queue_wait_seconds_count", graph="model", priority="high")] == 2
    assert found[key("request_duration_seconds_count", graph="model", kind="text")] == 2
    assert [found[key("sessions", graph="model", state=state)] for state in ("idle", "queued", "running")] == [1, 0, 0]
    engine = {"engine": "1", "model": tiny_model_path.name}
    assert found[key("kv_cells", **engine)] == 4 * 512
    assert found[key("kv_used_cells", **engine)] == graph.statistics().n_cells_used > 0
    assert found[key("kv_bytes", **engine, tier="cache")] == graph.statistics().n_kv_bytes > 0
    assert found[key("steps_total", **engine)] == graph.statistics().n_steps
    assert found[key("step_tokens_total", **engine)] == graph.statistics().n_tokens_decoded


def test_gauges_say_what_the_status_says(
    backend: Backend, server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = EngineStatistics(
        id=7,
        model="/models/m.gguf",
        n_waiting=5,
        n_running=3,
        n_sequences=4,
        n_cells=100,
        n_cells_used=60,
        n_kv_bytes=1000,
        n_host_bytes=200,
        n_sessions_in_host=2,
    )
    idle = EngineStatistics(id=8, model="/models/m.gguf")
    session = SessionStatus(1, "", "model", "queued", age_s=1.0, idle_s=0.0, n_tokens_cached=0)
    graph = GraphStatus("model", "/models/m.gguf", n_sessions=2, n_queued=2, n_running=0, engine=engine)
    status = replace(
        backend.status(), graphs=(graph, graph), sessions=(session, session), engines=(engine, idle), n_queued=2
    )
    monkeypatch.setattr(backend, "status", lambda: status)
    found = scrape(server)
    names = {"queued_requests": 5, "running_requests": 3, "batch_places": 4, "batch_occupancy_ratio": 0.75}
    for name, value in (names | {"kv_cells": 100, "kv_used_cells": 60, "host_sessions": 2}).items():
        assert found[key(name, engine="7", model="m.gguf")] == value
        assert found[key(name, engine="8", model="m.gguf")] == 0
    for tier, value in (("cache", 1000), ("host", 200)):
        assert found[key("kv_bytes", engine="7", model="m.gguf", tier=tier)] == value
    assert found[key("sessions", graph="model", state="queued")] == 2, "of both graphs of that name"
    assert found[key("sessions", graph="model", state="running")] == 0


def test_counters_never_fall_when_graphs_come_and_go(backend: Backend, server: MetricsServer) -> None:
    """Of what is named after graphs: a rate over a counter that falls would be nonsense."""
    before: Samples = {}
    for _ in range(3):
        with backend.load_by_name("model") as graph, graph.init_execution_context() as context:
            context.run_inference("hello")
            during = scrape(server)
        after = scrape(server)
        for earlier, later in ((before, during), (during, after)):
            counters = {k: v for k, v in earlier.items() if ("graph", "model") in k[1] and "sessions" not in k[0]}
            assert all(later[k] >= value for k, value in counters.items() if not k[0].endswith("_created"))
        before = after
    assert before[key("requests_total", graph="model", kind="text", reason="length")] == 3


def test_several_backends_have_a_label_and_a_single_one_has_none(backend: Backend, tiny_model_path: Path) -> None:
    with (
        Backend(CONFIG, llama=FakeLlama()) as other,
        serve_metrics({"left": backend, "right": other}, 0) as both,
        serve_metrics(other, 0) as single,
    ):
        other.register("model", tiny_model_path)
        for each in (backend, other, other):
            each.load_by_name("model").init_execution_context().run_inference("hello")
        reason = {"graph": "model", "kind": "text", "reason": "length"}
        found = scrape(both)
        assert found[key("requests_total", backend="left", **reason)] == 1
        assert found[key("requests_total", backend="right", **reason)] == 2
        assert all("backend" in dict(labels) for _, labels in found)
        assert scrape(single)[key("requests_total", **reason)] == 2
        names = [row["name"] for row in json.loads(fetch(f"{both.url}/status.json"))["backends"]]
        assert names == ["left", "right"]


def test_a_collector_goes_into_a_registry_of_ones_own_and_not_into_the_global_one(backend: Backend) -> None:
    registry = CollectorRegistry(auto_describe=True)
    collector = MetricsCollector(backend)
    registry.register(collector)
    described = {family.name for family in collector.describe()}
    assert described == {family.name for family in collector.collect()}
    assert not any(family.name.startswith("wasi_nn") for family in REGISTRY.collect())
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(MetricsCollector(backend))


def test_each_metric_is_documented_with_its_labels(backend: Backend, server: MetricsServer) -> None:
    backend.load_by_name("model").init_execution_context().run_inference("hello")
    text = (Path(__file__).resolve().parents[2] / "docs" / "monitoring.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(wasi_nn_\w+)` \| (\w+) \| ([\w, ]+) \|", text, re.MULTILINE)
    documented = {(name.removesuffix("_total"), kind, frozenset(labels.split(", "))) for name, kind, labels in rows}
    families = text_string_to_metric_families(fetch(f"{server.url}/metrics"))
    served = {
        (each.name, each.type, frozenset({label for sample in each.samples for label in sample.labels} - {"le"}))
        for each in families
        if not each.name.endswith("_created")
    }
    assert documented == served


def test_a_closed_collector_counts_no_more(backend: Backend) -> None:
    collector = MetricsCollector(backend)
    graph = backend.load_by_name("model")

    def n_durations() -> float:
        samples = [sample for family in collector.collect() for sample in family.samples]
        return sum(each.value for each in samples if each.name == "wasi_nn_request_duration_seconds_count")

    graph.init_execution_context().run_inference("hello")
    assert n_durations() == 1
    collector.close()
    collector.close()
    graph.init_execution_context().run_inference("hello")
    assert n_durations() == 1


@pytest.mark.parametrize(("name", "shown"), [('a "name"\nwith\\all 語', None), ("caf\udce9.gguf", "caf\\udce9.gguf")])
def test_names_that_are_no_plain_text_do_not_break_the_format(
    backend: Backend, server: MetricsServer, tiny_model_path: Path, name: str, shown: str | None
) -> None:
    backend.register(name, tiny_model_path)
    backend.load_by_name(name).init_execution_context({"session_id": "s\n"}).run_inference("hello")
    assert scrape(server)[key("generated_tokens_total", graph=shown or name)] == 6
    assert StatusSample.model_validate_json(fetch(f"{server.url}/status.json")).backends[0].graphs[0].n_sessions == 1


# The server.


def test_the_status_is_there_as_json(backend: Backend, server: MetricsServer) -> None:
    backend.load_by_name("model").init_execution_context({"session_id": "a"}).run_inference("hello")
    (status,) = json.loads(fetch(f"{server.url}/status.json"))["backends"]
    assert [row["session_id"] for row in status["sessions"]] == ["a"]
    assert [row["name"] for row in status["graphs"]] == ["model"]
    assert status["tasks"][0]["n_by_reason"] == {"length": 1}
    assert status["now_s"] > 0


def test_openmetrics_and_compression_are_answered(server: MetricsServer) -> None:
    text = fetch(f"{server.url}/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert text.endswith("# EOF\n")


def test_other_paths_say_what_there_is(server: MetricsServer) -> None:
    assert "/metrics" in fetch(f"{server.url}/")
    with pytest.raises(HTTPError) as caught:
        fetch(f"{server.url}/etc/passwd")
    assert caught.value.code == 404
    assert b"/status.json" in caught.value.read()


def test_a_port_in_use_is_an_error_that_says_what_to_do(backend: Backend, server: MetricsServer) -> None:
    with pytest.raises(RuntimeFailure, match=rf"port {server.port}: Address already in use; choose another port, or 0"):
        serve_metrics(backend, server.port)
    assert fetch(server.url), "the first one is unharmed"


@pytest.mark.parametrize("port", [-1, 65536, "9100", True, None])
def test_a_port_that_is_none(backend: Backend, port: Any) -> None:
    with pytest.raises(InvalidArgument, match="a metrics port is a number"):
        serve_metrics(backend, port)


@pytest.mark.parametrize("address", ["192.0.2.1", "a" * 300, "::ffff:1:2:3:4:5:6:7:8"])
def test_an_address_that_is_none_of_this_machine(backend: Backend, address: str) -> None:
    with pytest.raises(InvalidArgument, match="give an address of this machine"):
        serve_metrics(backend, 0, address)


def test_ipv6(backend: Backend) -> None:
    if not socket.has_ipv6:
        pytest.skip("this Python has no IPv6")
    try:
        server = serve_metrics(backend, 0, "::1")
    except InvalidArgument as error:
        pytest.skip(f"this machine has no IPv6: {error}")
    with server:
        assert server.url == f"http://[::1]:{server.port}"
        assert json.loads(fetch(f"{server.url}/status.json"))


@pytest.mark.parametrize("wrong", [None, "backend", {"a": None}, {1: None}])
def test_what_is_no_backend(wrong: Any) -> None:
    with pytest.raises(InvalidArgument, match="metrics are those of a Backend"):
        serve_metrics(wrong, 0)


def test_closing_frees_the_port_and_ends_the_thread_beside_a_client_that_says_nothing(backend: Backend) -> None:
    server = serve_metrics(backend, 0)
    with socket.create_connection(("127.0.0.1", server.port)):
        assert fetch(server.url)
        server.close()
        server.close()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", server.port))
        assert not any(thread.name == "wasi-nn-metrics" for thread in threading.enumerate())
    with serve_metrics(backend, server.port) as again:
        assert fetch(again.url)


def test_a_closed_backend_still_answers_with_what_it_did(tiny_model_path: Path) -> None:
    with Backend(CONFIG, llama=FakeLlama()) as backend, serve_metrics(backend, 0) as server:
        backend.load_by_name(tiny_model_path).init_execution_context().run_inference("hello")
        backend.close()
        found = scrape(server)
        assert found[key("generated_tokens_total", graph=str(tiny_model_path))] == 6
        assert not any(name == "wasi_nn_kv_cells" for name, _ in found)


def test_scrapes_while_graphs_and_sessions_come_and_go(backend: Backend, server: MetricsServer) -> None:
    over = threading.Event()

    def serve() -> None:
        try:
            for number in range(15):
                with backend.load_by_name("model") as graph:
                    graph.init_execution_context().run_inference(f"{number}")
        finally:
            over.set()

    def watch() -> int:
        n_scrapes = 0
        while not over.is_set():
            scrape(server)
            n_scrapes += 1
        return n_scrapes

    with ThreadPoolExecutor(4) as threads:
        watching = [threads.submit(watch) for _ in range(2)]
        serving = [threads.submit(serve) for _ in range(2)]
        for done in serving:
            done.result(timeout=60)
        assert all(each.result(timeout=60) > 0 for each in watching)
    assert scrape(server)[key("requests_total", graph="model", kind="text", reason="length")] == 30
