"""A guest that calls anything with anything: numbers come back, and the next guest is served as ever."""

from __future__ import annotations

import logging
import random

import pytest

from tests.conftest import n_examples
from tests.host.abis import ABIS, Abi
from tests.host.conftest import MODEL
from tests.host.guests import OUT, PAGE, Driver, malloc_wat, memory_wat, wrapper_wat
from wasi_nn_backend.backend import Backend
from wasi_nn_backend.dialects import CORE_DIALECTS
from wasi_nn_backend.errors import RuntimeFailure
from wasi_nn_backend.host import GuestResult, HostLimits, RunConfig, run_module

N_CALLS = n_examples(1000)
N_BYTES = 2 * PAGE
MASKS = {"i32": 0xFFFF_FFFF, "i64": 0xFFFF_FFFF_FFFF_FFFF}
KNOWN_ERRNOS = {0, 1, 2, 3, 4, 5, 6, 7, 8, 100, 101, 102, 103}
#: Small enough to be reached, and to keep so many calls short.
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


abis = pytest.mark.parametrize("abi", ABIS, ids=str)


class Attacker:
    """Fills memory with plausible and implausible things, then calls at random."""

    def __init__(self, guest: Driver, seed: int) -> None:
        self.guest = guest
        self.random = random.Random(seed)
        # Handles are closed less often than they are used, or all calls would end at the handle.
        self.functions = [
            item
            for item in parameters_of(guest.abi).items()
            for _ in range(1 if item[0].startswith(("unload", "fin")) else 4)
        ]
        self.handles: dict[str, list[int]] = {"graph": [0], "context": [0]}
        names = [MODEL, b"gone", b"nobody", b"", b"a\0b", b"\xc3("]
        self.names = [(guest.place(name), len(name)) for name in names]
        self.configs = [(guest.place(config), len(config)) for config in CONFIGS]
        texts = [b"hello", b"x" * 90, b"", b"\xe2\x82", b"y" * 2000]
        self.tensors = [guest.tensor(text) for text in texts] + [guest.tensor(config) for config in CONFIGS]
        self.prompts = [(guest.place(text), len(text)) for text in texts]
        self.builders = guest.builders(texts[0])
        self.builder_array = guest.place(guest.abi.span(self.builders, 1))
        junk = self.random.randbytes(PAGE)
        guest.memory.write(guest.store, junk, PAGE)

    def word(self) -> int:
        """A number for anything: small, at an edge of memory, or any at all."""
        pick = self.random.random()
        if pick < 0.5:
            return self.random.randrange(8)
        if pick < 0.7:
            return self.random.choice([N_BYTES, PAGE, 0, 0xFFFF_FFFF, 0x8000_0000]) + self.random.randint(-20, 20)
        return self.random.getrandbits(self.guest.abi.n_bits)

    def arguments(self, function: str, parameters: tuple[str, ...]) -> list[int]:
        """Mostly right, so that calls get past the first check; each word may be replaced by a wrong one."""
        words: dict[str, int] = {}
        words["name"], words["n_name_bytes"] = self.random.choice(self.names)
        words["config"], words["n_config_bytes"] = self.random.choice(self.configs)
        words["tensor"] = self.random.choice(self.tensors)
        words["buffer"], words["n_buffer_bytes"] = PAGE, self.random.choice([0, 3, 100, 4096])
        words |= {kind: self.random.choice(handles[-4:]) for kind, handles in self.handles.items()}
        words["index"] = self.random.choice([0, 0, 1, 2])
        words["encoding"], words["target"], words["n_builders"] = 6, 0, 1
        words["builders"], words["builder_array"] = self.builders, self.builder_array
        words["prompt"], words["n_prompt_bytes"] = self.random.choice(self.prompts)
        if "inout_n_bytes" in parameters:
            self.guest.memory.write(self.guest.store, words["n_buffer_bytes"].to_bytes(4, "little"), OUT)
        chosen = []
        for parameter, kind in zip(parameters, self.guest.abi.types(function)[0], strict=True):
            right = words.get(parameter, OUT)
            chosen.append((self.word() if self.random.random() < 0.15 else right) & MASKS[kind])
        return chosen

    def attack(self, n_calls: int) -> dict[int, int]:
        """Counts of the numbers that came back."""
        counts: dict[int, int] = {}
        for _ in range(n_calls):
            name, parameters = self.random.choice(self.functions)
            errno = self.guest.call(name, *self.arguments(name, parameters))
            assert type(errno) is int
            if name == "run_inference":  # an address, from the malloc that starts at the third page
                assert errno == 0 or errno >= 2 * PAGE
                errno = 0 if errno else 1
            if errno == 0 and name.startswith(("load", "init")):
                kind = "graph" if name.startswith("load") else "context"
                self.handles[kind].append(self.guest.peek_u32(OUT) & 0xFF)
            counts[errno] = counts.get(errno, 0) + 1
        return counts


def parameters_of(abi: Abi) -> dict[str, tuple[str, ...]]:
    """The names of what each function takes, to choose likely values by."""
    return dict(next(dialect for dialect in CORE_DIALECTS if dialect.name == abi.dialect).functions)


def check(backend: Backend, abi: Abi, seed: int, caplog: pytest.LogCaptureFixture) -> dict[int, int]:
    with Driver(backend) as good:
        expected = good.generate(good.open(MODEL), b"hello")
    memory = memory_wat(abi, 20) + malloc_wat(abi, start=2 * PAGE)
    with Driver(backend, abi, limits=LIMITS, memory=memory) as guest:
        counts = Attacker(guest, seed).attack(N_CALLS)
        assert guest.state.fault is None
        assert counts.keys() <= KNOWN_ERRNOS
    assert [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR] == []
    with Driver(backend) as good:
        assert good.generate(good.open(MODEL), b"hello") == expected
    return counts


@pytest.mark.parametrize(
    ("abi", "seed"),
    [
        pytest.param(abi, seed, marks=[pytest.mark.slow] if seed else [])
        for abi in ABIS
        for seed in range(2 if abi.n_bits == 32 else 1)
    ],
    ids=str,
)
def test_random_calls_end_in_numbers(
    fake_backend: Backend, abi: Abi, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    counts = check(fake_backend, abi, seed, caplog)
    # The attack has to get somewhere to be worth anything.
    assert counts[0] > N_CALLS // 10
    assert {1, 2, 7} <= counts.keys()


@pytest.mark.parametrize("abi", [abi for abi in ABIS if abi.n_bits == 32 or abi.has_wide_lengths], ids=str)
def test_random_calls_to_llama_cpp_end_in_numbers(
    tiny_backend: Backend, abi: Abi, caplog: pytest.LogCaptureFixture
) -> None:
    assert check(tiny_backend, abi, 0, caplog)[0] > 0


@abis
def test_words_without_any_plan_do_no_harm_either(
    fake_backend: Backend, abi: Abi, caplog: pytest.LogCaptureFixture
) -> None:
    source = random.Random(0)
    functions = {name: [int(kind[1:]) for kind in abi.types(name)[0]] for name in abi.functions}
    with Driver(fake_backend, abi, limits=LIMITS) as guest:
        guest.memory.write(guest.store, source.randbytes(N_BYTES), 0)
        for _ in range(N_CALLS):
            name, widths = source.choice(list(functions.items()))
            assert guest.call(name, *map(source.getrandbits, widths)) in KNOWN_ERRNOS
        assert guest.state.fault is None
    assert [record for record in caplog.records if record.exc_info] == []


# --- the guest's malloc, which the host calls in the middle of a call of the guest ---


def constant(abi: Abi, value: int) -> str:
    return f"({abi.pointer}.const {value})"


def calls_wat(abi: Abi, *functions: str) -> str:
    """Calls with zeros, whose numbers are added up at address 8."""
    wat = ""
    for name in functions:
        parameters, result = abi.types(name)
        call = f"(call ${name} {' '.join(f'({kind}.const 0)' for kind in parameters)})"
        narrow = f"(i32.wrap_i64 {call})" if result == "i64" else call
        at = constant(abi, 8)
        wat += f"(i32.store {at} (i32.add (i32.load {at}) {narrow}))"
    return wat


#: What malloc does, and whether an answer comes of it.
USELESS_MALLOCS = {
    "NULL": lambda abi: constant(abi, 0),
    "the first byte behind memory": lambda abi: constant(abi, N_BYTES),
    "too near to the end": lambda abi: constant(abi, N_BYTES - 4),
    "the highest address": lambda abi: constant(abi, -1),
    "the highest positive one": lambda abi: constant(abi, (1 << (abi.n_bits - 1)) - 1),
    "one that wraps": lambda abi: constant(abi, -8),
    "a trap": lambda abi: "unreachable",
    "an access outside of memory": lambda abi: f"(drop (i32.load {constant(abi, -4)})) {constant(abi, 64)}",
    "endless recursion": lambda abi: "(call $malloc (local.get 0))",
}
USABLE_MALLOCS = {
    "one block for all": lambda abi: constant(abi, PAGE),
    "over the prompt": lambda abi: constant(abi, 1024),
    "over the out-parameters": lambda abi: constant(abi, 1),
    "in memory that was not there before": lambda abi: (
        f"({abi.pointer}.mul (memory.grow {constant(abi, 1)}) {constant(abi, PAGE)})"
    ),
}
hyperbeams = pytest.mark.parametrize("abi", [abi for abi in ABIS if abi.dialect == "hyperbeam"], ids=str)


@hyperbeams
@pytest.mark.parametrize("what", USELESS_MALLOCS)
def test_a_malloc_of_no_use_is_a_failed_call(fake_backend: Backend, abi: Abi, what: str) -> None:
    with Driver(fake_backend, abi, memory=memory_wat(abi) + malloc_wat(abi, USELESS_MALLOCS[what](abi))) as guest:
        context = guest.open(MODEL)
        before = guest.peek(0, N_BYTES)
        for _ in range(3):
            guest.forget_placed()
            assert guest.run_inference(b"hello") == 0
            assert guest.state.last_error is not None
            assert guest.state.last_error.errno == 5
            assert "malloc" in guest.state.last_error.message
        assert guest.peek(2048, N_BYTES - 2048) == before[2048:]
        assert guest.state.fault is None
        assert guest.generate(context, b"hello")


@hyperbeams
@pytest.mark.parametrize("what", USABLE_MALLOCS)
def test_where_the_answer_goes_is_the_guests_own_affair(fake_backend: Backend, abi: Abi, what: str) -> None:
    with Driver(fake_backend, abi, memory=memory_wat(abi) + malloc_wat(abi, USABLE_MALLOCS[what](abi))) as guest:
        expected = guest.generate(guest.open(MODEL), b"hello")
        for _ in range(3):
            address = guest.run_inference(b"hello")
            assert guest.text_at(address) == expected
            assert guest.peek(address + len(expected), 1) == b"\0"
        assert guest.state.fault is None


@hyperbeams
def test_a_malloc_that_calls_back_is_told_to_wait(fake_backend: Backend, abi: Abi) -> None:
    functions = list(abi.functions)
    body = calls_wat(abi, *functions) + constant(abi, PAGE)
    with Driver(fake_backend, abi, memory=memory_wat(abi) + malloc_wat(abi, body)) as guest:
        expected = guest.generate(guest.open(MODEL), b"hello")
        assert guest.text_at(guest.run_inference(b"hello")) == expected
        assert guest.peek_u32(8) == 4 * (len(functions) - 1), "busy, and 0 for run_inference"
        assert guest.state.last_error is not None
        assert "malloc" in guest.state.last_error.message
        assert (len(guest.state.graphs), len(guest.state.contexts)) == (1, 1)


@pytest.mark.parametrize(
    "malloc", ["(param f32) (result i32) i32.const 64", "(param i32)", "(result i32) i32.const 64"]
)
def test_a_malloc_of_another_type_is_none(fake_backend: Backend, malloc: str) -> None:
    abi = next(abi for abi in ABIS if abi.dialect == "hyperbeam")
    with Driver(fake_backend, abi, memory=f'{memory_wat(abi)} (func (export "malloc") {malloc})') as guest:
        guest.open(MODEL)
        assert guest.run_inference(b"hello") == 0
        assert guest.state.last_error is not None
        assert guest.state.last_error.errno == 6


def run_with_malloc(backend: Backend, body: str, **options: object) -> GuestResult:
    """A module with an export ``ask`` that loads and asks once, whose malloc does what ``body`` says."""
    abi = next(abi for abi in ABIS if abi.dialect == "hyperbeam")
    exit_wat = '(import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))'
    ask = (
        f'(data (i32.const 64) "{MODEL.decode()}") (func (export "ask") (result i32)'
        f" (drop (call $load_by_name (i32.const 64) (i32.const {len(MODEL)}) (i32.const 0)))"
        " (drop (call $init_execution_context (i32.const 0) (i32.const 0)))"
        " (call $run_inference (i32.const 64) (i32.const 3)))"
    )
    module = wrapper_wat(abi, memory_wat(abi) + malloc_wat(abi, body) + ask).replace(
        "(module", f"(module {exit_wat}", 1
    )
    return run_module(RunConfig(module.encode(), invoke="ask", use_cache=False, **options), backend)  # type: ignore[arg-type]


def test_a_malloc_that_spins_is_stopped(fake_backend: Backend) -> None:
    spin = "(loop $again (br $again)) unreachable"
    spent = run_with_malloc(fake_backend, spin, fuel=100_000, invoke_returns="number")
    assert spent.returned == (0,)
    assert "fuel" in str(spent.last_error)
    with pytest.raises(RuntimeFailure, match=r"returned NULL instead of a text.*run_inference: .*fuel"):
        run_with_malloc(fake_backend, spin, fuel=100_000)
    late = run_with_malloc(fake_backend, spin, timeout_s=0.1)
    assert (late.outcome, late.was_left_behind) == ("timeout", False)


def test_a_malloc_that_exits_ends_the_guest(fake_backend: Backend) -> None:
    result = run_with_malloc(fake_backend, "(call $exit (i32.const 9)) unreachable", invoke_returns="number")
    assert (result.outcome, result.exit_status) == ("exited", 9)
