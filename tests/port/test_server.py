"""The port's server, with a node at the other end of its pipes."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.port.conftest import ENDLESS, Node, RunningServer
from wasi_nn_backend import Backend
from wasi_nn_backend.errors import Cancelled, InvalidEncoding, TooLarge
from wasi_nn_backend.port import server as server_module
from wasi_nn_backend.port.calls import Call, Calls
from wasi_nn_backend.port.requests import OPERATIONS, CallRequest
from wasi_nn_backend.port.terms import Atom

OK, ERROR, TOKEN, REPLY, FAULT = map(Atom, ("ok", "error", "token", "reply", "fault"))
DONE = (OK, Atom("done"))


def code(answer: Any) -> bytes:
    assert answer[0] == ERROR
    assert answer[2]
    return bytes(answer[1])


def test_every_operation_that_is_listed_exists() -> None:
    assert all(callable(getattr(Calls, f"_{name}")) for name in OPERATIONS)


def test_the_calls_of_a_guest_give_what_python_gives(node: Node, tiny_model_path: Path) -> None:
    config = {"max_tokens": 8, "temperature": 0, "n_ctx": 512, "max_concurrent": 4}
    with Backend(config) as backend, backend.load_by_name(tiny_model_path) as graph:
        expected = graph.init_execution_context().run_inference("hello").encode()
    assert node.ask(10, "set_input", 3, 0, b"hello") == DONE
    assert node.ask(11, "compute", 3) == DONE
    assert node.ask(12, "get_output", 3, 0) == (OK, expected)
    metadata: Any = node.ask(13, "get_output", 3, 1)
    assert json.loads(metadata[1])["output_tokens"] == 8
    assert node.ask(14, "init_execution_context", 2, 4, b"ada") == (OK, Atom("false"))
    assert node.ask(15, "run_inference", 4, b"hello", b"") == (OK, expected)
    status: Any = node.ask(16, "status", 1)
    assert [row["session_id"] for row in json.loads(status[1])["sessions"]] == ["", "ada"]
    assert node.ask(17, "close_execution_context", 4) == DONE
    assert node.ask(18, "unload", 2) == DONE
    assert node.ask(19, "deinit_backend", 1) == DONE


def test_tokens_come_before_their_reply_and_make_the_text(node: Node) -> None:
    assert node.ask(4, "init_execution_context", 2, 4, b"") == (OK, Atom("false"))
    text: Any = node.ask(5, "run_inference", 4, b"hello", b"")
    node.call(6, "stream", 3, b"hello", b"")
    tokens = []
    while (term := node.receive())[0] == TOKEN:
        assert term[1] == 6
        tokens.append(term[2])
    assert term[:2] == (REPLY, 6)
    assert json.loads(term[2][1])["output_tokens"] == 8
    assert b"".join(tokens) == text[1]
    assert len(tokens) > 2


def test_a_stream_is_cancelled_after_its_first_token(node: Node) -> None:
    node.call(4, "stream", 3, b"hello", ENDLESS)
    assert node.receive()[:2] == (TOKEN, 4)
    node.send((Atom("cancel"), 4))
    assert code(node.reply(4)) == b"cancelled"
    assert node.ask(5, "run_inference", 3, b"hello", b"")[0] == OK  # type: ignore[index]


def test_many_calls_run_at_once(node: Node) -> None:
    for number in range(4, 8):
        assert node.ask(number, "init_execution_context", 2, number, b"") == (OK, Atom("false"))
        node.call(100 + number, "stream", number, b"hello", ENDLESS)
    streaming = set()
    while streaming != {104, 105, 106, 107}:
        streaming.add(node.receive()[1])
    node.call(1, "ping")
    assert node.reply(1) == (OK, Atom("pong"))
    assert node.ask(2, "deinit_backend", 1) is not None  # ends all of them


def test_a_context_is_busy_while_it_works(node: Node) -> None:
    node.call(4, "stream", 3, b"hello", ENDLESS)
    assert node.receive()[:2] == (TOKEN, 4)
    assert code(node.ask(5, "compute", 3)) == b"busy"
    assert node.ask(6, "close_execution_context", 3) is not None
    assert code(node.ask(7, "get_output", 3, 0)) == b"invalid_argument"


def test_what_is_wrong_is_an_error_of_its_call(node: Node) -> None:
    wrong: dict[bytes, list[tuple[Any, ...]]] = {
        b"invalid_argument": [
            ("compute", 99),
            ("compute",),
            ("compute", b"3"),
            ("compute", 3),  # no prompt
            ("get_output", 3, 2),
            ("no_such_operation",),
            ("__init__", 1),
            ("init_backend", 0, b""),
            ("init_backend", 1, b""),  # taken
            ("load_by_name", 99, 5, b"x", b""),
            ("init_execution_context", 2, 3, b""),
            ("unload", 99),
            ("run_inference", 3, b"hello", b'{"temperature": "warm"}'),
        ],
        b"invalid_encoding": [("init_backend", 9, b"{"), ("init_execution_context", 2, 9, b"\xff")],
        b"model_not_found": [("load_by_name", 1, 9, b"/no/such/file.gguf", b"")],
    }
    for expected, calls in wrong.items():
        for operation, *arguments in calls:
            assert (operation, code(node.ask(7, operation, *arguments))) == (operation, expected)


@pytest.mark.parametrize("term", [7, (), (Atom("call"), 1), (Atom("call"), b"1", Atom("ping"), []), (Atom("cancel"),)])
def test_what_is_no_request_is_a_fault(term: Any, running: RunningServer) -> None:
    running.node.send(term)
    assert running.node.receive()[0] == FAULT
    running.node.send_raw(b"\0\0\0\3abc")
    assert running.node.receive()[0] == FAULT
    assert running.node.ask(1, "ping") == (OK, Atom("pong"))


def test_a_number_stands_for_one_call(node: Node) -> None:
    node.call(4, "stream", 3, b"hello", ENDLESS)
    assert node.receive()[:2] == (TOKEN, 4)
    node.call(4, "compute", 3)
    assert code(node.reply(4)) == b"invalid_argument"
    node.send((Atom("cancel"), 4))
    assert code(node.reply(4)) == b"cancelled"


def test_too_many_calls_are_busy(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "N_CALLS_MAX", 1)
    node.call(4, "stream", 3, b"hello", ENDLESS)
    assert node.receive()[:2] == (TOKEN, 4)
    assert code(node.ask(5, "get_output", 3, 0)) == b"busy"


@pytest.mark.parametrize("ending", ["hang up", "stop"])
def test_the_end_cancels_what_runs(ending: str, running: RunningServer, node: Node) -> None:
    node.call(4, "stream", 3, b"hello", ENDLESS)
    assert node.receive()[:2] == (TOKEN, 4)
    if ending == "stop":
        running.server.stop()
    else:
        node.hang_up()
    running.join()
    assert running.error is None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("wasi-nn-call")]


@pytest.mark.parametrize(
    ("data", "error"), [(b"\x40\0\0\0", TooLarge), (b"\0\0\0\4ab", InvalidEncoding), (b"\0\0", InvalidEncoding)]
)
def test_a_broken_channel_ends_the_server(data: bytes, error: type[Exception], running: RunningServer) -> None:
    running.node.send_raw(data)
    running.node.hang_up()
    running.join()
    assert isinstance(running.error, error)


def test_a_defect_costs_one_call(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_config: bytes | None) -> Backend:
        raise ZeroDivisionError("out of order")

    running = RunningServer(calls=Calls(fail))
    assert running.node.receive()[0] == Atom("ready")
    assert code(running.node.ask(1, "init_backend", 1, b"")) == b"runtime_error"
    assert running.node.ask(2, "ping") == (OK, Atom("pong"))
    running.close()
    assert "out of order" in caplog.text


def test_a_cancel_before_the_work_is_heard() -> None:
    call = Call(CallRequest(1, "ping"), lambda _text: None)
    call.cancel()
    with pytest.raises(Cancelled):
        Calls().perform(call)
