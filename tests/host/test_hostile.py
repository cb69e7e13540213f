"""A guest that calls anything with anything: numbers come back, and the next guest is served as ever."""

from __future__ import annotations

import logging
import random

import pytest

from tests.host.conftest import MODEL
from tests.host.guests import OUT, PAGE, Driver
from wasi_nn_backend.backend import Backend
from wasi_nn_backend.dialects import CORE_DIALECTS, Dialect
from wasi_nn_backend.host import HostLimits

N_CALLS = 1000
N_BYTES = 2 * PAGE
KNOWN_ERRNOS = {0, 1, 2, 3, 4, 5, 6, 7, 8, 100, 101, 102, 103}
#: Small enough to be reached, and to keep a thousand calls short.
LIMITS = HostLimits(
    max_graphs=4,
    max_contexts=6,
    max_tensor_bytes=1000,
    max_config_bytes=300,
    allow_load_bytes=True,
    max_model_bytes=200,
)
CONFIGS = [
    b'{"n-predict": 4}',
    b'{"n-predict": 4, "stream-stdout": true}',
    b'{"ctx-size": 128, "temp": 1.5, "n-predict": 3}',
    b'{"reverse-prompt": "a", "n-predict": 5}',
    b'{"n-predict": "x"}',
    b"[1",
    b"\xff\xfe",
    b"{}",
]


class Attacker:
    """Fills memory with plausible and implausible things, then calls at random."""

    def __init__(self, guest: Driver, dialect: Dialect, seed: int) -> None:
        self.guest = guest
        self.random = random.Random(seed)
        # Handles are closed less often than they are used, or all calls would end at the handle.
        self.functions = [
            item for item in dialect.functions.items() for _ in range(1 if item[0].startswith(("unload", "fin")) else 4)
        ]
        self.handles: dict[str, list[int]] = {"graph": [0], "context": [0]}
        names = [MODEL, b"gone", b"nobody", b"", b"a\0b", b"\xc3("]
        self.names = [(guest.place(name), len(name)) for name in names]
        self.configs = [(guest.place(config), len(config)) for config in CONFIGS]
        texts = [b"hello", b"x" * 90, b"", b"\xe2\x82", b"y" * 2000]
        self.tensors = [guest.tensor(text) for text in texts] + [guest.tensor(config) for config in CONFIGS]
        junk = self.random.randbytes(PAGE)
        guest.memory.write(guest.store, junk, PAGE)

    def word(self) -> int:
        """A number for anything: small, at an edge of memory, or any at all."""
        pick = self.random.random()
        if pick < 0.5:
            return self.random.randrange(8)
        if pick < 0.7:
            return self.random.choice([N_BYTES, PAGE, 0, 0xFFFF_FFFF, 0x8000_0000]) + self.random.randint(-20, 20)
        return self.random.getrandbits(32)

    def arguments(self, parameters: tuple[str, ...]) -> list[int]:
        """Mostly right, so that calls get past the first check; each word may be replaced by a wrong one."""
        words: dict[str, int] = {}
        words["name"], words["n_name_bytes"] = self.random.choice(self.names)
        words["config"], words["n_config_bytes"] = self.random.choice(self.configs)
        words["tensor"] = self.random.choice(self.tensors)
        words["buffer"], words["n_buffer_bytes"] = PAGE, self.random.choice([0, 3, 100, 4096])
        words |= {kind: self.random.choice(handles[-4:]) for kind, handles in self.handles.items()}
        words["index"] = self.random.choice([0, 0, 1, 2])
        words["encoding"], words["target"], words["n_builders"] = 6, 0, 1
        words["builders"] = self.tensors[0] + 12  # a tensor's (address, length) of data is a builder, too
        chosen = []
        for parameter in parameters:
            right = words.get(parameter, OUT)
            chosen.append((self.word() if self.random.random() < 0.15 else right) & 0xFFFF_FFFF)
        return chosen

    def attack(self, n_calls: int) -> dict[int, int]:
        """Counts of the numbers that came back."""
        counts: dict[int, int] = {}
        for _ in range(n_calls):
            name, parameters = self.random.choice(self.functions)
            errno = self.guest.call(name, *self.arguments(parameters))
            assert type(errno) is int
            if errno == 0 and name.startswith(("load", "init")):
                kind = "graph" if name.startswith("load") else "context"
                self.handles[kind].append(self.guest.peek_u32(OUT) & 0xFF)
            counts[errno] = counts.get(errno, 0) + 1
        return counts


def check(backend: Backend, dialect: Dialect, seed: int, caplog: pytest.LogCaptureFixture) -> dict[int, int]:
    with Driver(backend) as good:
        expected = good.generate(good.open(MODEL), b"hello")
    with Driver(backend, dialect, limits=LIMITS) as guest:
        counts = Attacker(guest, dialect, seed).attack(N_CALLS)
        assert guest.state.fault is None
        assert counts.keys() <= KNOWN_ERRNOS
    assert [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR] == []
    with Driver(backend) as good:
        assert good.generate(good.open(MODEL), b"hello") == expected
    return counts


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("dialect", CORE_DIALECTS, ids=lambda dialect: dialect.name)
def test_a_thousand_random_calls_end_in_numbers(
    fake_backend: Backend, dialect: Dialect, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    counts = check(fake_backend, dialect, seed, caplog)
    # The attack has to get somewhere to be worth anything.
    assert counts[0] > N_CALLS // 10
    assert {1, 2, 7} <= counts.keys()


@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_random_calls_to_llama_cpp_end_in_numbers(
    tiny_backend: Backend, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    for dialect in CORE_DIALECTS:
        assert check(tiny_backend, dialect, seed, caplog)[0] > 0


@pytest.mark.parametrize("seed", range(5))
def test_words_without_any_plan_do_no_harm_either(
    fake_backend: Backend, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    source = random.Random(seed)
    for dialect in CORE_DIALECTS:
        with Driver(fake_backend, dialect, limits=LIMITS) as guest:
            guest.memory.write(guest.store, source.randbytes(N_BYTES), 0)
            for _ in range(N_CALLS):
                name, parameters = source.choice(list(dialect.functions.items()))
                assert guest.call(name, *(source.getrandbits(32) for _ in parameters)) in KNOWN_ERRNOS
            assert guest.state.fault is None
    assert [record for record in caplog.records if record.exc_info] == []
