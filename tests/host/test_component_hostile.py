"""A component that calls anything with anything: errors or its own trap come back, and the next is served as ever."""

from __future__ import annotations

import logging
import random
import threading
from typing import Any

import pytest
from wasmtime import WasmtimeError

from tests.host.component_guests import ComponentDriver, NNError
from wasi_nn_backend.backend import Backend
from wasi_nn_backend.host import HostLimits

N_CALLS = 300
#: Small enough to be reached.
LIMITS = HostLimits(
    max_graphs=3,
    max_contexts=3,
    max_tensor_bytes=1000,
    max_config_bytes=300,
    max_dims=4,
    max_held_bytes=5000,
    allow_load_bytes=True,
    max_model_bytes=200,
)
CONFIGS = [
    b'{"max_tokens": 4}',
    b'{"max_tokens": 3, "stream_stdout": true}',
    b'{"n_ctx": 128, "temperature": 1.5, "max_tokens": 3}',
    b'{"max_tokens": "x"}',
    b"[1",
    b"\xff\xfe",
    b"{}",
]
TEXTS = [b"hello", b"x" * 90, b"", b"\xe2\x82", b"y" * 2000, b"preload:/etc/passwd", b"GGUF"]
NAMES = ["default", "default", "gone", "nobody", "", "a\0b", "é"]
#: The kinds of handles that calls take, and give.
TAKES = {
    "tensor-dimensions": "tensor",
    "tensor-ty": "tensor",
    "tensor-data": "tensor",
    "drop-tensor": "tensor",
    "init-execution-context": "graph",
    "drop-graph": "graph",
    "drop-context": "context",
    "compute": "context",
}
GIVES = {"tensor-new": "tensor", "zeros": "tensor", "load": "graph", "load-by-name": "graph"}


class Attacker:
    """Calls at random, mostly with what fits: handles of the right kind, perhaps dropped; any of them may be wrong.

    Wrong ones are rare, since the first ends the guest.
    """

    def __init__(self, guest: ComponentDriver, seed: int) -> None:
        self.guest = guest
        self.random = random.Random(seed)
        self.handles: dict[str, list[int]] = {"tensor": [], "graph": [], "context": []}
        names = ["tensor-new", "compute", "load-by-name", "load", "zeros", *TAKES]
        self.names = [name for name in names for _ in range(1 if name.startswith("drop") else 3)]

    def handle(self, kind: str, *, is_taken: bool = False) -> int:
        handles = self.handles[kind]
        if not handles or self.random.random() < 0.001:
            return self.random.choice([0, 1, 7, 0x7FFF_FFFF, 0xFFFF_FFFF])
        handle = self.random.choice(handles[-8:])
        if is_taken and self.random.random() < 0.998:
            handles.remove(handle)
        return handle

    def arguments(self, name: str) -> list[Any]:
        pick = self.random.choice
        if name == "tensor-new":
            kind = 99 if self.random.random() < 0.001 else self.random.randrange(7)
            return [[1] * self.random.randrange(6), kind, pick(TEXTS + CONFIGS)]
        if name == "zeros":
            return [pick([0, 1, 999, 1001, 100_000])]
        if name == "load":
            return [[pick(TEXTS) for _ in range(self.random.randrange(4))], self.random.randrange(7), 0]
        if name == "load-by-name":
            return [pick(NAMES)]
        if name == "compute":
            n_inputs = min(pick([0, 1, 2]), len(self.handles["tensor"]))
            names = [pick(["prompt", "config", "0", "1", "x"]) for _ in range(n_inputs)]
            return [self.handle("context"), [(name, self.handle("tensor", is_taken=True)) for name in names]]
        return [self.handle(TAKES[name], is_taken=name.startswith("drop"))]

    def attack(self) -> dict[str, int]:
        """Counts of how calls ended, up to the guest's trap at the latest."""
        counts: dict[str, int] = {}
        for _ in range(N_CALLS):
            name = self.random.choice(self.names)
            if name in TAKES and not self.handles[TAKES[name]]:
                continue
            try:
                ended = self.call(name, self.arguments(name))
            except NNError as error:
                ended = error.code
            except WasmtimeError:
                counts["trap"] = 1
                break
            counts[ended] = counts.get(ended, 0) + 1
        return counts

    def call(self, name: str, arguments: list[Any]) -> str:
        is_fallible = name in ("compute", "load", "load-by-name", "init-execution-context")
        answer = self.guest.ask(name, *arguments) if is_fallible else self.guest.call(name, *arguments)
        if name == "compute":
            self.handles["tensor"] += [tensor for _, tensor in answer]
        elif name == "init-execution-context":
            self.handles["context"].append(answer)
        elif name in GIVES:
            self.handles[GIVES[name]].append(answer)
        return "ok"


def check(backend: Backend, seed: int, caplog: pytest.LogCaptureFixture) -> dict[str, int]:
    with ComponentDriver(backend) as good:
        expected = good.generate(good.open(), b"hello")
    with ComponentDriver(backend, limits=LIMITS) as guest:
        counts = Attacker(guest, seed).attack()
        assert guest.state.fault is None
    assert [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR] == []
    with ComponentDriver(backend) as good:
        assert good.generate(good.open(), b"hello") == expected
    return counts


def test_random_calls_end_in_results_errors_or_a_trap(fake_backend: Backend, caplog: pytest.LogCaptureFixture) -> None:
    total: dict[str, int] = {}
    for seed in range(8):
        for ended, n in check(fake_backend, seed, caplog).items():
            total[ended] = total.get(ended, 0) + n
    # The attack has to get somewhere to be worth anything.
    assert {"ok", "trap", "invalid-argument", "not-found", "too-large", "timeout"} <= total.keys()
    assert total["ok"] > 200


@pytest.mark.parametrize("seed", range(3))
def test_random_calls_to_llama_cpp_do_no_harm(
    tiny_backend: Backend, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert check(tiny_backend, seed, caplog)["ok"] > 0


@pytest.mark.parametrize(
    ("call", "arguments", "reason"),
    [
        ("tensor-new", [[], 99, b""], "invalid|unexpected|discriminant"),
        ("load", [[b"GGUF"], 99, 0], "invalid|unexpected|discriminant"),
        ("zeros", [16 << 20], "fuel allocated for hostcalls"),
        ("zeros", [1 << 30], "fuel allocated for hostcalls|unreachable"),
        ("recurse", [], "call stack exhausted"),
    ],
)
def test_what_wasmtime_stops_is_the_guests_own_trap(
    fake_backend: Backend, call: str, arguments: list[Any], reason: str
) -> None:
    with ComponentDriver(fake_backend) as good:
        context = good.open()
        expected = good.generate(context, b"hello")
        with ComponentDriver(fake_backend) as guest:
            guest.open()
            with pytest.raises(WasmtimeError, match=reason):
                guest.call(call, *arguments)
            assert guest.state.fault is None
        assert good.generate(context, b"hello") == expected


def test_a_context_of_another_kind_is_no_context(fake_backend: Backend) -> None:
    with ComponentDriver(fake_backend) as guest:
        context, graph = guest.open(), guest.load()
        assert context != graph
        with pytest.raises(WasmtimeError, match="handle index"):
            guest.call("compute", graph, [])


@pytest.mark.real  # ten seconds
def test_a_hundred_thousand_resources_are_the_end_of_one_guest(fake_backend: Backend) -> None:
    """wasmtime's own limit of a store."""
    with ComponentDriver(fake_backend) as guest:
        with pytest.raises(WasmtimeError, match=r"handle|resource|table"):
            guest.call("hoard", 200_000)
        assert guest.state.fault is None
    with ComponentDriver(fake_backend) as good:
        assert len(good.generate(good.open(), b"hello")) >= 24


def test_a_guest_that_spins_is_stopped_and_others_go_on(fake_backend: Backend) -> None:
    with ComponentDriver(fake_backend) as guest, ComponentDriver(fake_backend) as good:
        trapped: list[str] = []

        def spin() -> None:
            with pytest.raises(WasmtimeError) as raised:
                guest.call("spin")
            trapped.append(str(raised.value))

        thread = threading.Thread(target=spin)
        thread.start()
        assert len(good.generate(good.open(), b"hello")) >= 24
        guest.engine.increment_epoch()
        thread.join()
        assert "interrupt" in trapped[0]
