"""Which number stands for which execution context of a C host, and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import n_examples
from tests.fakes.llama import FakeLlama
from tests.unit.test_sessions import GREEDY, Clock
from wasi_nn_backend import Backend, Busy, ExecutionContext, InvalidArgument
from wasi_nn_backend.capi.contexts import ContextTable
from wasi_nn_backend.capi.host import Host
from wasi_nn_backend.capi.models import Environment
from wasi_nn_backend.dialects import CAPI, WAMR
from wasi_nn_backend.errors import NotFound

IDLE_S = 10


def make_host(clock: Clock, **config: Any) -> Host:
    backend = Backend(GREEDY | {"idle_timeout_ms": IDLE_S * 1000} | config, llama=FakeLlama(), clock=clock)
    return Host(backend, CAPI.door, Environment(), backend.close)


def load(host: Host, model: Path) -> int:
    return host.add_graph(lambda: host.load_by_name(str(model), None))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def host(clock: Clock, tiny_model_path: Path) -> Iterator[Host]:
    opened = make_host(clock)
    load(opened, tiny_model_path)
    yield opened
    opened.close()


def n_messages(host: Host, handle: int) -> int:
    return len(host.contexts.get(handle).messages)


def test_a_session_has_one_number_and_each_opening_needs_its_close(host: Host) -> None:
    handles = [host.open_session("ada") for _ in range(3)]
    assert len(set(handles)) == 1
    assert host.open_session("bob") != handles[0]
    for left in (2, 1, 0):
        host.contexts.get(handles[0]).run_inference("hello")
        host.contexts.close(handles[0])
        assert (handles[0] in host.contexts) == bool(left)
    with pytest.raises(InvalidArgument, match="is closed"):
        host.contexts.close(handles[0])
    again = host.open_session("ada")
    assert again not in handles
    assert n_messages(host, again) == 0


@pytest.mark.parametrize("limit", ["idle_timeout_ms", "max_sessions"])
def test_a_session_that_a_limit_has_closed_begins_anew(limit: str, clock: Clock, tiny_model_path: Path) -> None:
    host = make_host(clock, max_sessions=2)
    graph = load(host, tiny_model_path)
    old = host.open_session("ada")
    assert host.open_session("ada") == old
    host.contexts.get(old).run_inference("My name is Ada.")
    text = host.contexts.get(old).get_output()
    clock.now_s += IDLE_S
    if limit == "idle_timeout_ms":
        host.backend.sessions.remove_expired()
    else:
        for _ in range(2):
            host.add_context(host.graphs.get(graph).init_execution_context)
    with pytest.raises(InvalidArgument, match=limit):
        host.contexts.get(old).run_inference("Who am I?")
    new = host.open_session("ada")
    assert new != old
    assert host.open_session("ada") == new
    assert n_messages(host, new) == 0
    host.contexts.get(new).run_inference("hello")
    assert host.contexts.get(old).get_output() == text
    for _ in range(2):  # as often as it was opened
        host.contexts.close(old)
    with pytest.raises(InvalidArgument, match="is closed"):
        host.contexts.close(old)
    assert host.open_session("ada") == new
    host.close()


@pytest.mark.parametrize("is_named", [True, False])
def test_a_server_that_never_closes_does_not_grow(is_named: bool, tiny_model_path: Path) -> None:
    n_kept = 4
    with Backend(GREEDY | {"max_sessions": 2}, llama=FakeLlama()) as backend:
        graph = backend.load_by_name(tiny_model_path)
        table = ContextTable(n_closed_kept=n_kept)

        def open_one(n: int) -> int:
            config = {"session_id": f"user {n}"} if is_named else None
            return table.add(lambda: graph.init_execution_context(config))

        handles = [open_one(n) for n in range(100)]
        still_known = [handle in table for handle in handles]
        assert sum(still_known) <= 2 * (n_kept + 2) + 1
        assert all(still_known[-n_kept - 2 :])  # the latest ones, and those that are open
        with pytest.raises(InvalidArgument, match="max_sessions"):
            table.get(handles[-3]).compute()


def test_what_was_used_last_stays(clock: Clock, tiny_model_path: Path) -> None:
    with Backend(GREEDY | {"max_sessions": 2}, llama=FakeLlama(), clock=clock) as backend:
        graph = backend.load_by_name(tiny_model_path)
        table = ContextTable(n_closed_kept=1)
        first = table.add(graph.init_execution_context)
        for _ in range(20):
            clock.now_s += 1
            table.get(first).run_inference("hello")
            table.add(graph.init_execution_context)
        assert first in table  # one of the two that are open
        for _ in range(2):
            table.add(graph.init_execution_context)
        assert table.get(first).is_closed
        assert first in table


def test_contexts_of_unloaded_graphs_end_but_for_the_last_ones(tiny_model_path: Path) -> None:
    """Also those that nobody closed, whose graph they would keep in memory."""
    n_kept = 4
    with Backend(GREEDY, llama=FakeLlama()) as backend:
        table = ContextTable(n_closed_kept=n_kept)
        contexts = []
        for _ in range(60):
            graph = backend.load_by_name(tiny_model_path)
            handle = table.add(graph.init_execution_context)
            contexts.append(table.get(handle))
            graph.unload()
        open_ones = [context for context in contexts if not context.is_closed]
        assert n_kept <= len(open_ones) <= 2 * n_kept + 1
        assert open_ones == contexts[-len(open_ones) :]


def test_few_after_many_are_looked_at_again(tiny_model_path: Path) -> None:
    with Backend(GREEDY | {"max_sessions": 200}, llama=FakeLlama()) as backend:
        graph = backend.load_by_name(tiny_model_path)
        table = ContextTable(n_closed_kept=2)
        for handle in [table.add(graph.init_execution_context) for _ in range(100)]:
            table.close(handle)
        contexts = [table.get(table.add(graph.init_execution_context)) for _ in range(10)]
        graph.unload()
        graph = backend.load_by_name(tiny_model_path)
        for _ in range(12):
            table.add(graph.init_execution_context)
        assert sum(not context.is_closed for context in contexts) == 2


def test_a_session_stays_on_its_graph_while_it_is_open(host: Host, tiny_model_path: Path) -> None:
    first = host.open_session("ada")
    load(host, tiny_model_path)
    assert host.open_session("ada") == first
    later = host.open_session("bob")
    assert host.contexts.get(later).graph is not host.contexts.get(first).graph
    host.unload(0)
    on_other = host.open_session("ada")  # its graph is gone: a new one, on the newest
    assert on_other != first
    assert host.contexts.get(on_other).graph is host.contexts.get(later).graph


def test_a_session_needs_a_graph(clock: Clock) -> None:
    host = make_host(clock)
    with pytest.raises(NotFound, match="load a model"):
        host.open_session("ada")
    host.close()


def test_many_threads_that_open_a_session_get_one(host: Host, tiny_model_path: Path) -> None:
    def open_one(n: int) -> int:
        if n == 5:
            load(host, tiny_model_path)
        return host.open_session("ada")

    with ThreadPoolExecutor(8) as pool:
        handles = list(pool.map(open_one, range(32)))
    assert len(set(handles)) == 1
    for handle in handles:
        host.contexts.close(handle)
    assert handles[0] not in host.contexts


def test_an_id_in_a_configuration_is_the_same_session(host: Host) -> None:
    by_name = host.open_session("ada")
    graph = host.graphs.get(0)
    assert host.add_context(lambda: graph.init_execution_context({"session_id": "ada"})) == by_name
    moving = host.add_context(graph.init_execution_context)
    host.contexts.get(moving).set_input(0, "My name is Ada.")
    host.contexts.configure(moving, b'{"session_id": "ada"}')
    assert host.contexts.get(moving) is host.contexts.get(by_name)
    host.contexts.get(by_name).compute()  # the prompt came along
    for handle in (by_name, by_name):
        host.contexts.close(handle)
    assert n_messages(host, moving) == 2
    assert host.contexts.get(host.open_session("ada")) is host.contexts.get(moving)


def test_a_handle_with_two_openings_keeps_its_session(host: Host) -> None:
    handle = host.open_session("ada")
    host.contexts.configure(handle, b'{"max_tokens": 3, "session_id": "ada"}')
    host.open_session("ada")
    host.contexts.configure(handle, b'{"max_tokens": 4}')
    assert host.contexts.get(handle).settings.stopping.max_tokens == 4
    with pytest.raises(InvalidArgument, match='is the session "ada"'):
        host.contexts.configure(handle, b'{"session_id": "bob"}')
    host.contexts.close(handle)
    host.contexts.configure(handle, b'{"session_id": "bob"}')
    assert host.open_session("bob") == handle
    assert host.open_session("ada") != handle


@pytest.mark.parametrize("what", ["open", "close"])
def test_a_handle_may_be_opened_or_closed_while_it_changes_its_session(
    what: str, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = host.open_session("ada")
    context = host.contexts.get(handle)
    graph = host.graphs.get(0)
    configure = graph.configure

    def meanwhile(found: ExecutionContext, config: bytes) -> ExecutionContext:
        other = configure(found, config)
        if what == "open":
            assert host.open_session("ada") == handle
        else:
            host.contexts.close(handle)
        return other

    monkeypatch.setattr(graph, "configure", meanwhile)
    with pytest.raises(Busy if what == "open" else InvalidArgument, match=str(handle)):
        host.contexts.configure(handle, b'{"session_id": "bob"}')
    if what == "open":
        assert host.contexts.get(handle) is context
        for _ in range(2):
            assert not context.is_closed
            host.contexts.close(handle)
    assert context.is_closed
    assert graph.contexts() == []


def test_a_guest_names_its_session_in_its_configuration(tiny_model_path: Path) -> None:
    """WAMR's hosts pass nothing on that would name one in another way."""
    backend = Backend(GREEDY, llama=FakeLlama())
    host = Host(backend, WAMR.door, Environment(allows_any_path=True), backend.close)
    load(host, tiny_model_path)
    graph = host.graphs.get(0)
    one, other = (host.add_context(graph.init_execution_context) for _ in range(2))
    assert one != other
    for handle in (one, other):
        host.contexts.configure(handle, b'{"session_id": "ada"}')
    assert host.contexts.get(one) is host.contexts.get(other)
    host.close()


def test_a_closed_backend_takes_no_session(host: Host) -> None:
    host.open_session("ada")
    host.close()
    with pytest.raises((InvalidArgument, NotFound)):
        host.open_session("ada")


@settings(max_examples=n_examples(40))
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(("open", "close", "expire", "rename")), st.integers(0, 2), st.integers(0, 5)),
        max_size=30,
    )
)
def test_openings_and_closings_balance_whatever_happens(
    tiny_model_path: Path, steps: list[tuple[str, int, int]]
) -> None:
    """``held``: how often each handle was opened and not closed."""
    clock = Clock()
    host = make_host(clock)
    load(host, tiny_model_path)
    held: dict[int, int] = {}
    seen: set[ExecutionContext] = set()
    for what, name, choice in steps:
        chosen = list(held)[choice % len(held)] if held else None
        if what == "open":
            handle = host.open_session(f"session {name}")
            assert host.contexts.get(handle).session_id == f"session {name}"
            held[handle] = held.get(handle, 0) + 1
        elif what == "expire":
            clock.now_s += IDLE_S
            host.backend.sessions.remove_expired()
        elif chosen is not None and what == "close":
            host.contexts.close(chosen)
            held[chosen] -= 1
            if not held[chosen]:
                del held[chosen]
        elif chosen is not None:
            rename(host.contexts, chosen, f"session {name}", is_shared=held[chosen] > 1)
        seen |= {host.contexts.get(handle) for handle in held}
    for handle, n_openings in held.items():
        for _ in range(n_openings):
            host.contexts.close(handle)
        assert handle not in host.contexts
    assert all(context.is_closed for context in seen)
    host.close()


def rename(contexts: ContextTable, handle: int, session_id: str, *, is_shared: bool) -> None:
    before = contexts.get(handle)
    try:
        contexts.configure(handle, f'{{"session_id": "{session_id}"}}'.encode())
    except InvalidArgument:  # it is shared, or a limit has closed it
        assert contexts.get(handle) is before
        assert is_shared or before not in before.graph.contexts()
    else:
        assert contexts.get(handle).session_id == session_id
