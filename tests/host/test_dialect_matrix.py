"""Every dialect, every call, every number that it can answer with: guests written for each, on real llama.cpp.

``CELLS`` is the matrix: what is called, what is wrong, the number that the specification has for it, the situation that
the guest is in, and what the guest does. Each row is run in every dialect that has the call, in 32-bit and in 64-bit
memories. The same numbers stand in docs/dialects.md.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from tests.host.abis import ABIS, Abi
from tests.host.conftest import GREEDY, MODEL
from tests.host.guests import OUT, PAGE, Driver, malloc_wat, memory_wat
from wasi_nn_backend.backend import Backend
from wasi_nn_backend.host import HostLimits

DOCUMENT = Path(__file__).parents[2] / "docs" / "dialects.md"

N_PAGES = 16
END = N_PAGES * PAGE
#: The last pages are for outputs and for what malloc hands out.
MALLOC_START = 12 * PAGE
WHOLE_WINDOW = b'{"ctx-size": 128, "n-predict": -1, "ignore-eos": true}'
LONG = b"@" * 200
AT_ONCE = b'{"timeout_ms": 1}'
EMBEDDING = b'{"embedding": true}'
THREE = b'{"n-predict": 3}'

#: Where the guest is. "plain": nothing special, and ``load`` may take bytes. "strict": it may not. "narrow": one graph,
#: one context, texts of 100 bytes. "closing": the backend has been closed. "late": a time-out that is over at once.
#: "blind": the module exports no memory.
Situation = Literal["plain", "strict", "narrow", "closing", "late", "blind"]
LIMITS: dict[Situation, HostLimits] = {
    "plain": HostLimits(allow_load_bytes=True),
    "strict": HostLimits(),
    "narrow": HostLimits(
        max_graphs=1,
        max_contexts=1,
        max_tensor_bytes=100,
        max_config_bytes=50,
        max_name_bytes=50,
        allow_load_bytes=True,
        max_model_bytes=100,
    ),
}


class Guest(Driver):
    """What the rows are written in. ``graph`` and ``context`` are open from the start, but in "blind"."""

    def __init__(self, backend: Backend, abi: Abi, situation: Situation, model: bytes) -> None:
        limits = LIMITS.get(situation, LIMITS["plain"])
        memory = "" if situation == "blind" else memory_wat(abi, N_PAGES) + malloc_wat(abi, start=MALLOC_START)
        super().__init__(backend, abi, limits=limits, memory=memory)
        self.model = model
        self.graph = self.context = 0
        if situation == "blind":
            return
        self.graph = self.load(MODEL)
        assert self.call("init_execution_context", self.graph, OUT) == 0
        self.context = self.peek_u32(OUT)

    # Calls as rows need them; each returns the number.

    def zeros(self, function: str) -> int:
        return self.call(function, *([0] * len(self.abi.types(function)[0])))

    def load_parts(self, *parts: bytes, encoding: int | None = None, target: int = 0, out: int = OUT) -> int:
        encoding = self.abi.ggml if encoding is None else encoding
        return self.call_load(self.builders(*parts), len(parts), encoding, target, out)

    def by_name(self, name: bytes, out: int = OUT) -> int:
        return self.call("load_by_name", self.place(name), len(name), out)

    def with_config(self, config: bytes, name: bytes = MODEL, out: int = OUT) -> int:
        at = self.place(config)
        return self.call("load_by_name_with_config", self.place(name), len(name), at, len(config), out)

    def prompt(self, text: bytes) -> int:
        return self.call("set_input", self.context, 0, self.tensor(text))

    def configured(self, *configs: bytes) -> Guest:
        for config in configs:
            assert self.configure(self.context, config) == 0, self.state.last_error
        return self

    def prompted(self, text: bytes = b"hello") -> Guest:
        assert self.prompt(text) == 0, self.state.last_error
        return self

    def computed(self) -> Guest:
        assert self.prompted().call("compute", self.context) == 0, self.state.last_error
        return self

    def stepped(self) -> Guest:
        assert self.prompted().call("compute_single", self.context) == 0, self.state.last_error
        return self

    def unloaded(self) -> Guest:
        assert self.call("unload", self.graph) == 0
        return self

    def finalized(self) -> Guest:
        assert self.finalize() == 0
        return self

    def finalize(self) -> int:
        return self.call("finalize_execution_context", self.context)

    def init(self, graph: int | None = None, out: int = OUT) -> int:
        return self.call("init_execution_context", self.graph if graph is None else graph, out)

    def set_tensor(self, tensor: int, context: int | None = None) -> int:
        return self.call("set_input", self.context if context is None else context, 0, tensor)

    def load_builder_at(self, address: int) -> int:
        return self.call_load(address, 1, self.abi.ggml, 0, OUT)

    def compute(self) -> int:
        return self.call("compute", self.context)

    def single(self) -> int:
        return self.call("compute_single", self.context)

    def last_single(self) -> int:
        return self.single_tokens(self.context)[1]

    def read(self, function: str = "get_output", *, n_bytes: int = PAGE, buffer: int = END - PAGE) -> int:
        return self.call_get_output(self.context, 0, buffer, n_bytes, OUT, function=function)


#: (call, what is wrong, number, situation, what the guest does)
Row = tuple[str, str, int, Situation, Callable[[Guest], int]]
# fmt: off
CELLS: tuple[Row, ...] = (
    ("load", "good", 0, "plain", lambda g: g.load_parts(g.model)),
    ("load", "good, with configuration", 0, "plain", lambda g: g.load_parts(g.model, b'{"ctx-size": 256}')),
    ("load", "good, autodetect", 0, "plain", lambda g: g.load_parts(g.model, encoding=11 - g.abi.ggml)),
    ("load", "no builder", 1, "plain", lambda g: g.load_parts()),
    ("load", "not a model", 1, "plain", lambda g: g.load_parts(b"neither GGUF nor anything")),
    ("load", "unknown target", 1, "plain", lambda g: g.load_parts(g.model, target=3)),
    ("load", "bad out-pointer", 1, "plain", lambda g: g.load_parts(g.model, out=END - 3)),
    ("load", "bad builders", 1, "plain", lambda g: g.load_builder_at(END - 4)),
    ("load", "builder outside memory", 1, "plain", lambda g: g.load_builder_at(g.place(g.abi.span(END - 9, 10)))),
    ("load", "configuration of a wrong type", 1, "plain", lambda g: g.load_parts(g.model, b'{"ctx-size": "x"}')),
    ("load", "unknown encoding", 2, "plain", lambda g: g.load_parts(g.model, encoding=99)),
    ("load", "encoding of other models", 2, "plain", lambda g: g.load_parts(g.model, encoding=1)),
    ("load", "configuration is no JSON", 2, "plain", lambda g: g.load_parts(g.model, b"nonsense")),
    ("load", "no memory", 3, "blind", lambda g: g.zeros("load")),
    ("load", "too many graphs", 4, "narrow", lambda g: g.load_parts(b"GGUF")),
    ("load", "backend closes", 5, "closing", lambda g: g.load_parts(g.model)),
    ("load", "bytes not allowed", 6, "strict", lambda g: g.load_parts(g.model)),
    ("load", "path of the host", 6, "plain", lambda g: g.load_parts(b"preload:/etc/passwd")),
    ("load", "too many bytes", 7, "narrow", lambda g: g.load_parts(b"x" * 101)),
    ("load", "too many builders", 7, "plain", lambda g: g.load_parts(*[b""] * 17)),
    ("load_by_name", "good", 0, "plain", lambda g: g.by_name(MODEL)),
    ("load_by_name", "bad out-pointer", 1, "plain", lambda g: g.by_name(MODEL, END - 3)),
    ("load_by_name", "bad name", 1, "plain", lambda g: g.call("load_by_name", END - 3, 4, OUT)),
    ("load_by_name", "NUL in the name", 1, "plain", lambda g: g.by_name(b"de\0fault")),
    ("load_by_name", "name is not UTF-8", 2, "plain", lambda g: g.by_name(b"\xff\xfe")),
    ("load_by_name", "no memory", 3, "blind", lambda g: g.zeros("load_by_name")),
    ("load_by_name", "too many graphs", 4, "narrow", lambda g: g.by_name(MODEL)),
    ("load_by_name", "backend closes", 5, "closing", lambda g: g.by_name(MODEL)),
    ("load_by_name", "name too long", 7, "plain", lambda g: g.by_name(b"x" * 4097)),
    ("load_by_name", "unknown name", 8, "plain", lambda g: g.by_name(b"nobody")),
    ("load_by_name", "empty name", 8, "plain", lambda g: g.by_name(b"")),
    ("load_by_name", "path of the host", 8, "plain", lambda g: g.by_name(b"/etc/passwd")),
    ("load_by_name", "file is missing", 103, "plain", lambda g: g.by_name(b"gone")),
    ("load_by_name_with_config", "good", 0, "plain", lambda g: g.with_config(b'{"ctx-size": 256}')),
    ("load_by_name_with_config", "good, empty", 0, "plain", lambda g: g.with_config(b"")),
    ("load_by_name_with_config", "bad out-pointer", 1, "plain", lambda g: g.with_config(b"{}", out=END - 3)),
    ("load_by_name_with_config", "wrong type", 1, "plain", lambda g: g.with_config(b'{"temp": "hot"}')),
    ("load_by_name_with_config", "no object", 1, "plain", lambda g: g.with_config(b"[]")),
    ("load_by_name_with_config", "no JSON", 2, "plain", lambda g: g.with_config(b"nonsense")),
    ("load_by_name_with_config", "no memory", 3, "blind", lambda g: g.zeros("load_by_name_with_config")),
    ("load_by_name_with_config", "too many graphs", 4, "narrow", lambda g: g.with_config(b"{}")),
    ("load_by_name_with_config", "backend closes", 5, "closing", lambda g: g.with_config(b"{}")),
    ("load_by_name_with_config", "too long", 7, "narrow", lambda g: g.with_config(b"{}" + b" " * 49)),
    ("load_by_name_with_config", "unknown name", 8, "plain", lambda g: g.with_config(b"{}", name=b"nobody")),
    ("load_by_name_with_config", "file is missing", 103, "plain", lambda g: g.with_config(b"{}", name=b"gone")),
    ("init_execution_context", "good", 0, "plain", lambda g: g.init()),
    ("init_execution_context", "unknown graph", 1, "plain", lambda g: g.init(77)),
    ("init_execution_context", "bad pointer", 1, "plain", lambda g: g.init(out=END - 3)),
    ("init_execution_context", "no memory", 3, "blind", lambda g: g.zeros("init_execution_context")),
    ("init_execution_context", "too many", 4, "narrow", lambda g: g.init()),
    ("init_execution_context", "backend closes", 1, "closing", lambda g: g.init()),
    ("set_input", "good", 0, "plain", lambda g: g.prompt(b"hello")),
    ("set_input", "good, empty", 0, "plain", lambda g: g.prompt(b"")),
    ("set_input", "good, configuration", 0, "plain", lambda g: g.configure(g.context, b'{"temp": 0.5}')),
    ("set_input", "unknown context", 1, "plain", lambda g: g.set_tensor(g.tensor(b"x"), 77)),
    ("set_input", "bad tensor", 1, "plain", lambda g: g.set_tensor(END - 5)),
    ("set_input", "unknown type", 1, "plain", lambda g: g.set_tensor(g.tensor(b"x", type_word=9))),
    ("set_input", "configuration of a wrong type", 1, "plain", lambda g: g.configure(g.context, b'{"temp": "hot"}')),
    ("set_input", "configuration is no JSON", 2, "plain", lambda g: g.configure(g.context, b"nonsense")),
    ("set_input", "no memory", 3, "blind", lambda g: g.zeros("set_input")),
    ("set_input", "prompt too long", 7, "narrow", lambda g: g.prompt(b"x" * 101)),
    ("set_input", "configuration too long", 7, "narrow", lambda g: g.configure(g.context, b"{}" + b" " * 49)),
    ("set_input", "too many dimensions", 7, "plain", lambda g: g.set_tensor(g.tensor(b"", dims=(1,) * 65))),
    ("compute", "good", 0, "plain", lambda g: g.prompted().compute()),
    ("compute", "unknown context", 1, "plain", lambda g: g.call("compute", 77)),
    ("compute", "no prompt", 1, "plain", lambda g: g.compute()),
    ("compute", "no memory", 3, "blind", lambda g: g.zeros("compute")),
    ("compute", "time-out", 4, "late", lambda g: g.configured(AT_ONCE).prompted().compute()),
    ("compute", "guest is stopped", 5, "plain", lambda g: stopped(g.prompted()).compute()),
    ("compute", "context is full", 101, "plain", lambda g: g.configured(WHOLE_WINDOW).prompted().compute()),
    ("compute", "prompt too long", 102, "plain", lambda g: g.configured(WHOLE_WINDOW).prompted(LONG).compute()),
    ("get_output", "good", 0, "plain", lambda g: g.computed().read()),
    ("get_output", "good, nothing computed", 0, "plain", lambda g: g.read()),
    ("get_output", "unknown context", 1, "plain", lambda g: g.call_get_output(77, 0, PAGE, 8, OUT)),
    ("get_output", "bad buffer", 1, "plain", lambda g: g.computed().read(buffer=END - 3)),
    ("get_output", "bad size pointer", 1, "plain", lambda g: g.call("get_output", *bad_size(g))),
    ("get_output", "no memory", 3, "blind", lambda g: g.zeros("get_output")),
    ("get_output", "buffer too small", 7, "plain", lambda g: g.computed().read(n_bytes=1)),
    ("get_output", "buffer of nothing", 7, "plain", lambda g: g.computed().read(n_bytes=0)),
    ("compute_single", "good", 0, "plain", lambda g: g.prompted().single()),
    ("compute_single", "unknown context", 1, "plain", lambda g: g.call("compute_single", 77)),
    ("compute_single", "no prompt", 1, "plain", lambda g: g.single()),
    ("compute_single", "graph is unloaded", 1, "plain", lambda g: g.prompted().unloaded().single()),
    ("compute_single", "no memory", 3, "blind", lambda g: g.zeros("compute_single")),
    # The guest sets the pace, so its pauses are no reason to end the run.
    ("compute_single", "no time-out", 100, "late", lambda g: g.configured(AT_ONCE).prompted().last_single()),
    ("compute_single", "guest is stopped", 5, "plain", lambda g: stopped(g.prompted()).single()),
    ("compute_single", "embedding", 6, "plain", lambda g: g.configured(EMBEDDING).prompted().single()),
    ("compute_single", "end of the text", 100, "plain", lambda g: g.configured(THREE).prompted().last_single()),
    ("compute_single", "context is full", 101, "plain", lambda g: g.configured(WHOLE_WINDOW).prompted().last_single()),
    ("compute_single", "prompt too long", 102, "plain", lambda g: g.configured(WHOLE_WINDOW).prompted(LONG).single()),
    ("get_output_single", "good", 0, "plain", lambda g: g.stepped().read("get_output_single")),
    ("get_output_single", "good, before a token", 0, "plain", lambda g: g.read("get_output_single")),
    ("get_output_single", "unknown context", 1, "plain", lambda g: g.call("get_output_single", 77, 0, PAGE, 8, OUT)),
    ("get_output_single", "bad buffer", 1, "plain", lambda g: g.stepped().read("get_output_single", buffer=END - 3)),
    ("get_output_single", "no memory", 3, "blind", lambda g: g.zeros("get_output_single")),
    ("get_output_single", "buffer too small", 7, "plain", lambda g: g.stepped().read("get_output_single", n_bytes=0)),
    ("fini_single", "good", 0, "plain", lambda g: g.stepped().call("fini_single", g.context)),
    ("fini_single", "good, without a run", 0, "plain", lambda g: g.call("fini_single", g.context)),
    ("fini_single", "unknown context", 1, "plain", lambda g: g.call("fini_single", 77)),
    ("fini_single", "no memory", 3, "blind", lambda g: g.zeros("fini_single")),
    ("unload", "good", 0, "plain", lambda g: g.call("unload", g.graph)),
    ("unload", "unknown graph", 1, "plain", lambda g: g.call("unload", 77)),
    ("unload", "twice", 1, "plain", lambda g: g.unloaded().call("unload", g.graph)),
    ("unload", "no memory", 3, "blind", lambda g: g.zeros("unload")),
    ("finalize_execution_context", "good", 0, "plain", lambda g: g.finalize()),
    ("finalize_execution_context", "unknown", 1, "plain", lambda g: g.call("finalize_execution_context", 77)),
    ("finalize_execution_context", "twice", 1, "plain", lambda g: g.finalized().finalize()),
    ("finalize_execution_context", "no memory", 3, "blind", lambda g: g.zeros("finalize_execution_context")),
    ("run_inference", "bad prompt", 0, "plain", lambda g: g.call("run_inference", END - 3, 4)),
    ("run_inference", "no memory", 0, "blind", lambda g: g.zeros("run_inference")),
    ("run_inference", "prompt too long for the host", 0, "narrow", lambda g: g.run_inference(b"x" * 101)),
    ("run_inference", "time-out", 0, "late", lambda g: g.configured(AT_ONCE).run_inference(b"hello")),
    ("run_inference", "guest is stopped", 0, "plain", lambda g: stopped(g).run_inference(b"hello")),
    ("run_inference", "context is full", 0, "plain", lambda g: g.configured(WHOLE_WINDOW).run_inference(b"hello")),
    ("run_inference", "prompt too long", 0, "plain", lambda g: g.configured(WHOLE_WINDOW).run_inference(LONG)),
)
# fmt: on


def stopped(guest: Guest) -> Guest:
    guest.state.stop()
    return guest


def bad_size(guest: Guest) -> tuple[int, ...]:
    words = (guest.context, 0, PAGE) if guest.abi.is_legacy else (guest.context, 0, PAGE, PAGE)
    return (*words, END - 3)


@pytest.fixture(scope="module")
def model(tiny_model_path: Path) -> bytes:
    return tiny_model_path.read_bytes()


@pytest.fixture(scope="module")
def backend(tiny_model_path: Path) -> Iterator[Backend]:
    with Backend(GREEDY) as backend:
        register(backend, tiny_model_path)
        yield backend


@pytest.fixture(scope="module")
def late_backend(tiny_model_path: Path) -> Iterator[Backend]:
    """A second goes by between any two looks at its clock."""
    ticks = itertools.count()
    with Backend({**GREEDY, "backend": {"auto_cleanup": False}}, clock=lambda: float(next(ticks))) as backend:
        register(backend, tiny_model_path)
        yield backend


def register(backend: Backend, path: Path) -> None:
    backend.register(MODEL.decode(), path)
    backend.register("gone", path.with_name("nowhere.gguf"))


@pytest.mark.parametrize(
    ("abi", "row"),
    [
        pytest.param(
            abi,
            row,
            id=f"{abi}-{row[0]}-{row[2]}-{row[1].replace(' ', '_')}",
            # In a fast run, 64-bit memories stand for each other.
            marks=[pytest.mark.slow] if abi.n_bits == 64 and not abi.has_wide_lengths else [],
        )
        for abi in ABIS
        for row in CELLS
        if row[0] in abi.functions
    ],
)
def test_the_number_of_each_cell(
    abi: Abi, row: Row, model: bytes, tiny_model_path: Path, request: pytest.FixtureRequest
) -> None:
    function, _, errno, situation, play = row
    if situation == "closing":
        with Backend(GREEDY) as closing:
            register(closing, tiny_model_path)
            guest = Guest(closing, abi, situation, model)
    else:
        fixture = "late_backend" if situation == "late" else "backend"
        guest = Guest(request.getfixturevalue(fixture), abi, situation, model)
    with guest:
        assert play(guest) == errno, guest.state.last_error
        assert guest.state.fault is None
        if errno not in (0, 100):
            assert guest.state.last_error is not None
            assert (guest.state.last_error.function, guest.state.last_error.errno) == (function, errno)


with_run_inference = pytest.mark.parametrize("abi", [abi for abi in ABIS if "run_inference" in abi.functions], ids=str)


@with_run_inference
def test_run_inference_answers_through_malloc(abi: Abi, backend: Backend, model: bytes) -> None:
    with Guest(backend, abi, "plain", model) as guest:
        expected = guest.generate(guest.context, b"hello")
        addresses = [guest.run_inference(b"hello") for _ in range(3)]
        assert len(set(addresses)) == 3
        assert all(MALLOC_START <= address < END for address in addresses)
        assert [guest.text_at(address) for address in addresses] == [expected] * 3
        assert json.loads(guest.output(guest.context, 1))["output_tokens"] > 0


@with_run_inference
def test_run_inference_is_of_the_context_opened_last(abi: Abi, backend: Backend, model: bytes) -> None:
    with Guest(backend, abi, "plain", model) as guest:
        guest.configured(b'{"n-predict": 2}')
        short = guest.text_at(guest.run_inference(b"hello"))
        assert guest.call("init_execution_context", guest.graph, OUT) == 0
        assert len(guest.text_at(guest.run_inference(b"hello"))) > len(short)


@with_run_inference
def test_run_inference_without_a_context_or_a_malloc_is_null(abi: Abi, backend: Backend) -> None:
    with Driver(backend, abi) as guest:
        assert guest.run_inference(b"hello") == 0
        assert "no execution context is open" in str(guest.state.last_error)
        guest.open(MODEL)
        assert guest.run_inference(b"hello") == 0
        assert "exports no malloc" in str(guest.state.last_error)


def test_the_document_has_the_same_numbers() -> None:
    """The table in docs/dialects.md: a row for each call, a column for each number, a cross where a cell is here."""
    text = DOCUMENT.read_text(encoding="utf-8")
    header = re.search(r"^\| call \|((?: \d+ \|)+)$", text, re.MULTILINE)
    assert header is not None
    numbers = [int(number) for number in header[1].split("|")[:-1]]
    found = {
        name: {number for number, mark in zip(numbers, marks.split("|")[:-1], strict=True) if mark.strip()}
        for name, marks in re.findall(r"^\| `(\w+)` \|((?: x? ?\|)+)$", text, re.MULTILINE)
    }
    stated: dict[str, set[int]] = {}
    for function, _, errno, *_ in CELLS:
        if function != "run_inference":
            stated.setdefault(function, set()).add(errno)
    assert found == stated
