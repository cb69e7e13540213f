"""Guests that take all they can get: each runs into a limit of its own, and the others are served as ever."""

from __future__ import annotations

import stat
import struct
import tempfile
from pathlib import Path

import pytest

from tests.host.conftest import GREEDY, MODEL
from tests.host.guests import OUT, Driver, command_wat, text_data
from wasi_nn_backend.backend import Backend
from wasi_nn_backend.host import GuestPool, HostLimits, RunConfig, run_module
from wasi_nn_backend.llama.tiny_model import write_tiny_model

INVALID_ARGUMENT, BUSY, UNSUPPORTED, TOO_LARGE = 1, 4, 6, 7
MIB = 1 << 20
N_CONTEXTS = 100_000

LOAD = f"(drop (call $load_by_name (i32.const 100) (i32.const {len(MODEL)}) (i32.const {OUT})))"
OPEN = f"(drop (call $init_execution_context (i32.const 0) (i32.const {OUT})))"
PROMPT = struct.pack("<5I", 0, 0, 3, 600, 5)
DATA = text_data(100, MODEL) + text_data(500, PROMPT) + text_data(600, b"hello")


def loop(body: str) -> str:
    return f"(loop $again {body} (br $again))"


#: What each of them does until it is ended, and how that shows.
HOSTILE = {
    "allocates": ('(module (memory (export "memory") 1) (func (export "_start") '
                  + loop("(if (i32.eq (memory.grow (i32.const 16)) (i32.const -1)) (then unreachable))") + "))",
                  "unreachable"),
    "fills tables": ('(module (table $t 1 funcref) (func (export "_start") '
                     + loop("(if (i32.eq (table.grow $t (ref.null func) (i32.const 65536)) (i32.const -1))"
                            " (then unreachable))") + "))", "unreachable"),
    "has two memories": ('(module (memory 1) (memory 1) (func (export "_start")))', "memory"),
    "recurses": ('(module (func $f (export "_start") (call $f)))', "call stack exhausted"),
    "spins": ('(module (func (export "_start") (loop $again (br $again))))', "longer than"),
    "calls": (command_wat(loop("(drop (call $compute (i32.const 7)))")).decode(), "longer than"),
    "loads": (command_wat(LOAD + loop(LOAD), data=DATA).decode(), "longer than"),
    "opens": (command_wat(LOAD + loop(OPEN), data=DATA).decode(), "longer than"),
    "prints": (command_wat(loop(f"(drop (call $fd_write (i32.const 1) (i32.const {OUT}) (i32.const 1) (i32.const 0)))"),
                           data=text_data(OUT, struct.pack("<II", 0, 60000))).decode(), "wrote more than"),
}  # fmt: skip


def test_a_good_guest_beside_hostile_ones(tiny_backend: Backend) -> None:
    with Driver(tiny_backend) as good:
        context = good.open(MODEL)
        expected = good.generate(context, b"hello")
        limits = HostLimits(max_contexts=200, max_graphs=50)
        configs = [
            RunConfig(
                text.encode(), timeout_s=0.5 if "longer" in reason else 60, max_memory_bytes=8 * MIB, limits=limits
            )
            for text, reason in HOSTILE.values()
        ]
        with GuestPool(tiny_backend, len(HOSTILE), max_output_bytes=10 * MIB, use_cache=False) as pool:
            futures = [pool.submit(config) for config in configs]
            while not all(future.done() for future in futures):
                assert good.generate(context, b"hello") == expected
            outputs = [future.result() for future in futures]
        for (name, (_, reason)), output in zip(HOSTILE.items(), outputs, strict=True):
            assert output.error is not None, name
            assert reason in output.error, name
            assert output.result is not None, name
            assert output.result.fault is None, name
        assert good.generate(context, b"hello") == expected
    assert [graph.n_sessions for graph in tiny_backend.status().graphs] == []


def test_a_hundred_thousand_contexts(fake_backend: Backend) -> None:
    """As many as the limit are open; the guest is told of the rest, and nobody else loses one."""
    body = f"""
        (local $n i32) (local $n_busy i32)
        {LOAD}
        (loop $again
          (if (i32.eq (call $init_execution_context (i32.const 0) (i32.const {OUT})) (i32.const {BUSY}))
            (then (local.set $n_busy (i32.add (local.get $n_busy) (i32.const 1)))))
          (br_if $again (i32.lt_u (local.tee $n (i32.add (local.get $n) (i32.const 1))) (i32.const {N_CONTEXTS}))))
        (if (i32.ne (local.get $n_busy) (i32.const {N_CONTEXTS - 150})) (then unreachable))"""
    with Driver(fake_backend) as good:
        context = good.open(MODEL)
        expected = good.generate(context, b"hello")
        module = command_wat(body, data=DATA)
        limits = HostLimits(max_contexts=150, max_host_share=1.0)  # nobody waits here for what pacing would give
        result = run_module(RunConfig(module, limits=limits, use_cache=False), fake_backend)
        assert (result.outcome, result.exit_status) == ("exited", 0), result
        assert good.generate(context, b"hello") == expected


def test_who_opens_many_contexts_loses_its_own(fake_backend: Backend) -> None:
    """``max_sessions`` is 100: the guest that has most of them gives one up, whoever needs the place."""
    with Driver(fake_backend) as many, Driver(fake_backend) as few, Driver(fake_backend) as late:
        first = few.open(MODEL)
        few.set_prompt(first, b"hello")
        graph = many.load(MODEL)
        for _ in range(300):
            assert many.call("init_execution_context", graph, OUT) == 0
        last = many.peek_u32(OUT)
        assert late.generate(late.open(MODEL), b"hello")
        assert few.call("compute", first) == 0
        many.set_prompt(last, b"hello")
        assert many.call("compute", last) == 0
        assert many.call("compute", 0) == INVALID_ARGUMENT


def test_a_guest_has_no_number_for_what_is_anothers(fake_backend: Backend) -> None:
    with Driver(fake_backend) as owner, Driver(fake_backend) as other:
        context = owner.open(MODEL)
        expected = owner.generate(context, b"hello")
        for handle in (*range(20), 0xFFFF_FFFF):
            assert other.call("unload", handle) == INVALID_ARGUMENT
            assert other.call("finalize_execution_context", handle) == INVALID_ARGUMENT
            assert other.call("init_execution_context", handle, OUT) == INVALID_ARGUMENT
            assert other.call("compute", handle) == INVALID_ARGUMENT
            assert other.call("get_output", handle, 0, 0, 0, OUT) == INVALID_ARGUMENT
        other.open(MODEL)  # its graph 0 and its context 0
        assert other.call("unload", 0) == 0
        assert owner.generate(context, b"hello") == expected


def test_a_session_id_of_another_guest_is_a_session_of_ones_own(fake_backend: Backend) -> None:
    config = b'{"session_id": "the same", "prompt_mode": "chat"}'
    with Driver(fake_backend) as owner, Driver(fake_backend) as other:
        mine, yours = owner.open(MODEL), other.open(MODEL)
        assert owner.configure(mine, config) == other.configure(yours, config) == 0
        owner.generate(mine, b"a secret")
        assert other.state.contexts.get(yours).messages == ()


def test_priority_and_user_are_the_hosts_to_give(fake_backend: Backend) -> None:
    document = b'{"task": {"priority": "urgent", "user_id": "somebody else"}}'
    with Driver(fake_backend) as guest, Driver(fake_backend) as other:
        contexts = [guest.open(MODEL), guest.open(MODEL, document), guest.open(MODEL)]
        assert guest.configure(contexts[2], document) == 0
        tasks = [guest.state.contexts.get(context).settings.task for context in contexts]
        assert {task.priority for task in tasks} == {"normal"}
        assert len({task.user_id for task in tasks}) == 1
        assert other.state.contexts.get(other.open(MODEL)).settings.task.user_id not in {"", tasks[0].user_id}


def test_an_operators_user_and_priority_hold(tmp_path: Path, fake_backend: Backend) -> None:
    (tmp_path / "other.gguf").touch()
    fake_backend.register("other", tmp_path / "other.gguf", {"task": {"priority": "low", "user_id": "batch"}})
    with Driver(fake_backend) as guest:
        task = guest.state.contexts.get(guest.open(b"other")).settings.task
        assert (task.priority, task.user_id) == ("low", "batch")


def test_a_signal_that_arrives_in_a_pause_stops_the_guest(
    fake_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(duration_s: float) -> None:
        raise KeyboardInterrupt

    with Driver(fake_backend, limits=HostLimits(max_host_share=0.001)) as guest:
        monkeypatch.setattr(guest.state.pacer, "_sleep", interrupt)
        context = guest.open(MODEL)
        for _ in range(100_000):
            guest.call("get_output", context, 0, 0, 0, OUT)
            if guest.state.is_stopped:
                break
        assert isinstance(guest.state.fault, KeyboardInterrupt)


# --- sizes ---


def test_a_gibibyte_of_tensor_is_too_large(fake_backend: Backend) -> None:
    with Driver(fake_backend) as guest:
        context = guest.open(MODEL)
        tensor = guest.place(struct.pack("<5I", 0, 0, 3, 0, 1 << 30))
        assert [guest.call("set_input", context, index, tensor) for index in (0, 1, 7)] == [TOO_LARGE] * 3
        assert "4194304" in str(guest.state.last_error) or "1048576" in str(guest.state.last_error)


def test_prompts_have_a_limit_of_their_own(fake_backend: Backend) -> None:
    with Driver(fake_backend, limits=HostLimits(max_prompt_bytes=10)) as guest:
        context = guest.open(MODEL)
        assert guest.call("set_input", context, 0, guest.tensor(b"0123456789")) == 0
        assert guest.call("set_input", context, 0, guest.tensor(b"0123456789a")) == TOO_LARGE
        assert guest.configure(context, b'{"n-predict": 3}') == 0


def test_what_contexts_hold_together_is_limited(fake_backend: Backend) -> None:
    with Driver(fake_backend, limits=HostLimits(max_held_bytes=1000)) as guest:
        first, second = guest.open(MODEL), guest.open(MODEL)
        assert guest.call("set_input", first, 0, guest.tensor(b"a" * 600)) == 0
        assert guest.call("set_input", second, 0, guest.tensor(b"a" * 600)) == BUSY
        assert guest.call("set_input", first, 0, guest.tensor(b"a" * 900)) == 0  # in place of the other
        assert guest.configure(second, b'{"n-predict": 1}' + b" " * 100) == BUSY
        assert guest.call("finalize_execution_context", first) == 0
        assert guest.call("set_input", second, 0, guest.tensor(b"a" * 900)) == 0
        config = b'{"n-predict": 1}' + b" " * 100
        at = guest.place(config)
        name = guest.place(MODEL)
        load = ("load_by_name_with_config", name, len(MODEL), at, len(config), OUT)
        assert guest.call(*load) == BUSY
        assert guest.call("finalize_execution_context", second) == 0
        assert guest.call(*load) == 0
        graph = guest.peek_u32(OUT)
        guest.open(MODEL)
        assert guest.call("set_input", guest.peek_u32(OUT), 0, guest.tensor(b"a" * 900)) == BUSY
        assert guest.call("unload", graph) == 0
        assert guest.call("set_input", guest.peek_u32(OUT), 0, guest.tensor(b"a" * 900)) == 0


# --- work ---


def test_token_by_token_runs_cannot_flood_the_queue(fake_backend: Backend) -> None:
    with Driver(fake_backend, limits=HostLimits(max_open_runs=3)) as guest:
        graph = guest.load(MODEL)
        contexts = []
        for _ in range(5):
            assert guest.call("init_execution_context", graph, OUT) == 0
            contexts.append(guest.peek_u32(OUT))
            guest.set_prompt(contexts[-1], b"hello")
        assert [guest.call("compute_single", context) for context in contexts] == [0, 0, 0, BUSY, BUSY]
        assert [guest.call("compute_single", context) for context in contexts[:3]] == [0, 0, 0]
        ends = [
            lambda: guest.call("fini_single", contexts[0]),
            lambda: guest.call("compute", contexts[3]),
            lambda: guest.call("finalize_execution_context", contexts[4]),
        ]
        for context, end in zip((contexts[3], contexts[4], contexts[0]), ends, strict=True):
            assert guest.call("compute_single", context) == BUSY
            assert end() == 0
            assert guest.call("compute_single", context) == 0
        pieces, errno = guest.single_tokens(contexts[1])
        assert (errno, len(pieces) > 0) == (100, True)
        assert guest.call("compute_single", contexts[3]) == 0  # a run that has ended counts no more


def test_unloading_a_graph_ends_the_token_by_token_runs_on_it(fake_backend: Backend) -> None:
    """Guests that load their model for each question and stop at a word unload it in the middle of a run."""
    with Driver(fake_backend, limits=HostLimits(max_open_runs=2)) as guest:

        def begin() -> tuple[int, int]:
            graph = guest.load(MODEL)
            assert guest.call("init_execution_context", graph, OUT) == 0
            context = guest.peek_u32(OUT)
            guest.set_prompt(context, b"hello")
            return graph, context

        _, kept = begin()
        assert guest.call("compute_single", kept) == 0
        for _ in range(4):
            graph, context = begin()
            assert guest.call("compute_single", context) == 0
            read = [guest.output(context, index, function="get_output_single") for index in (0, 1)]
            assert guest.call("unload", graph) == 0
            assert [guest.output(context, index, function="get_output_single") for index in (0, 1)] == read
        assert [guest.call("compute_single", begin()[1]) for _ in range(2)] == [0, BUSY]  # the first still counts
        assert guest.call("compute_single", kept) == 0


def test_ctx_sizes_that_need_an_engine_each_are_counted(fake_backend: Backend) -> None:
    with Driver(fake_backend, limits=HostLimits(max_engine_settings=3)) as guest:
        name = guest.place(MODEL)

        def load(n_ctx: int) -> int:
            config = b'{"ctx-size": %d}' % n_ctx
            return guest.call("load_by_name_with_config", name, len(MODEL), guest.place(config), len(config), OUT)

        context = guest.open(MODEL)
        assert [load(n) for n in (128, 256, 512)] == [0, 0, TOO_LARGE]
        assert guest.configure(context, b'{"ctx-size": 1024}') == TOO_LARGE
        assert [load(n) for n in (128, 256)] == [0, 0]
        assert guest.configure(context, b'{"ctx-size": 256}') == 0
        assert guest.call("load_by_name", name, len(MODEL), OUT) == 0


def test_a_window_can_be_limited(fake_backend: Backend) -> None:
    with Driver(fake_backend, limits=HostLimits(max_ctx_tokens=2048)) as guest:
        context = guest.open(MODEL, b'{"ctx-size": 1024}')
        assert guest.configure(context, b'{"ctx-size": 2048}') == 0
        assert guest.configure(context, b'{"ctx-size": 2049}') == TOO_LARGE
        assert guest.configure(context, b'{"ctx-size": 0}') == TOO_LARGE  # as long as the model was trained


# --- models from memory ---


@pytest.fixture
def model(tmp_path: Path) -> bytes:
    path = tmp_path / "source.gguf"
    write_tiny_model(path)
    return path.read_bytes()


def test_a_model_from_memory_lies_in_a_private_file_while_it_is_open(
    tmp_path: Path, model: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    limits = HostLimits(allow_load_bytes=True, max_model_bytes=int(1.5 * len(model)))
    with Backend(GREEDY) as backend:
        with Driver(backend, limits=limits, memory='(memory (export "memory") 64)') as guest:
            builders = guest.place(struct.pack("<II", guest.place(model), len(model)))
            assert guest.call("load", builders, 1, 6, 0, OUT) == 0
            (file,) = folder.rglob("*.gguf")
            assert [stat.S_IMODE(path.stat().st_mode) for path in (file, file.parent)] == [0o600, 0o700]
            assert guest.call("load", builders, 1, 6, 0, OUT) == BUSY  # more than the host keeps for one guest
            assert guest.call("unload", 0) == 0
            assert list(folder.iterdir()) == []
            assert guest.call("load", builders, 1, 6, 0, OUT) == 0
        assert list(folder.iterdir()) == []


def test_what_is_no_model_never_reaches_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_backend: Backend
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with Driver(fake_backend, limits=HostLimits(allow_load_bytes=True)) as guest:
        builders = guest.place(struct.pack("<II", guest.place(b"GGML and more"), 13))
        assert guest.call("load", builders, 1, 6, 0, OUT) == INVALID_ARGUMENT
        preload = guest.place(struct.pack("<II", guest.place(b"preload:/etc/passwd"), 19))
        assert guest.call("load", preload, 1, 6, 0, OUT) == UNSUPPORTED
