"""The engine when things go wrong in the library, and its promises about batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.fakes.llama import FakeContext, FakeLlama, FakeModel
from wasi_nn_backend.engine import Engine, EngineOptions, Generation, GenerationLimits, ShiftPolicy
from wasi_nn_backend.errors import Cancelled, RuntimeFailure
from wasi_nn_backend.kvcache import PoolLimits
from wasi_nn_backend.llama.interface import ContextParams, DecodeBatch, DecodeStatus, Greedy, ModelParams
from wasi_nn_backend.output import FinishReason
from wasi_nn_backend.scheduler import Request

PROMPT = list(b"the prompt of a test")
DEFAULTS = EngineOptions()


@pytest.fixture
def model(tmp_path: Path) -> FakeModel:
    path = tmp_path / "model.gguf"
    path.touch()
    return FakeLlama().load_model(ModelParams(path))


class MakeEngine(Protocol):
    def __call__(self, context: FakeContext, options: EngineOptions = ...) -> Engine: ...


@pytest.fixture
def make_engine(model: FakeModel) -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def make(context: FakeContext, options: EngineOptions = DEFAULTS) -> Engine:
        engines.append(Engine(context, model.vocabulary, time.monotonic, options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def context_of(model: FakeModel, **params: int) -> FakeContext:
    return model.create_context(ContextParams(**({"n_ctx": 256, "n_sequences": 4, "n_batch": 32} | params)))


def generation(
    model: FakeModel,
    number: int,
    *,
    prompt: list[int] = PROMPT,
    n_tokens: int = 20,
    shift: ShiftPolicy | None = None,
) -> Generation:
    request = Request(id=number, session_id=number, tokens=[*prompt, ord("0") + number % 10])
    limits = GenerationLimits(n_tokens_max=n_tokens, shift=shift)
    return Generation(request, model.create_sampler([Greedy()]), limits, streams=False)


def run(engine: Engine, *generations: Generation) -> list[bytes]:
    for each in generations:
        engine.submit(each)
    for each in generations:
        assert each.wait(30)
    return [each.text for each in generations]


class Faulty(FakeContext):
    """Fails one decode in the way a test asks for."""

    fault: DecodeStatus | Exception | None = None
    n_faults = 1

    def decode(self, batch: DecodeBatch) -> DecodeStatus:
        fault = self.fault
        self.n_faults -= fault is not None
        if self.n_faults <= 0:
            self.fault, self.n_faults = None, 1
        if isinstance(fault, Exception):
            super().decode(batch)  # what lies in the memory afterwards is anybody's guess
            raise fault
        if fault is DecodeStatus.ABORTED:
            self._abort_half(batch)
            return fault
        return super().decode(batch) if fault is None else fault

    def _abort_half(self, batch: DecodeBatch) -> None:
        half = DecodeBatch()
        for i in range(len(batch) // 2):
            half.add([batch.tokens[i]], batch.positions[i], batch.sequence_ids[i], logits_for_last=False)
        if len(half):
            super().decode(half)


@pytest.mark.parametrize("fault", [RuntimeFailure("broken"), ValueError("a bug"), DecodeStatus.NO_ROOM])
def test_a_fault_ends_what_it_struck_and_nothing_else(
    model: FakeModel, make_engine: MakeEngine, fault: Exception | DecodeStatus
) -> None:
    """No room is a fault where it stays so with nothing else in the cache."""
    context = Faulty(model, ContextParams(n_ctx=256, n_sequences=4, n_batch=32))
    engine = make_engine(context)
    [expected] = run(engine, generation(model, 1))
    context.fault = fault
    context.n_faults = 2 if fault is DecodeStatus.NO_ROOM else 1
    struck = generation(model, 2)
    run(engine, struck)
    assert struck.finish_reason is FinishReason.ERROR
    assert isinstance(struck.error, RuntimeFailure)
    assert run(engine, generation(model, 1)) == [expected]
    [again] = run(engine, generation(model, 2))
    assert again == run(make_engine(context_of(model)), generation(model, 2))[0]


def test_no_room_is_found_room_for(model: FakeModel, make_engine: MakeEngine) -> None:
    """Idle sessions leave the cache first, then those that run, but for one; nobody's text changes."""
    expected = run(make_engine(context_of(model)), *(generation(model, i) for i in range(4)))
    context = Faulty(model, ContextParams(n_ctx=256, n_sequences=4, n_batch=32))
    engine = make_engine(context)
    assert run(engine, generation(model, 0)) == expected[:1]
    context.fault, context.n_faults = DecodeStatus.NO_ROOM, 3
    runs = [generation(model, i) for i in range(1, 4)]
    assert run(engine, *runs) == expected[1:]
    assert context.fault is None
    assert sum(each.request.n_interruptions for each in runs) >= 1
    assert engine.statistics().n_tokens_evicted > 0


def test_an_aborted_step_is_done_again(model: FakeModel, make_engine: MakeEngine) -> None:
    expected = run(make_engine(context_of(model)), *(generation(model, i) for i in range(3)))
    context = Faulty(model, ContextParams(n_ctx=256, n_sequences=4, n_batch=32))
    context.fault = DecodeStatus.ABORTED
    assert run(make_engine(context), *(generation(model, i) for i in range(3))) == expected


class Uncuttable(FakeContext):
    """Like a recurrent model's memory: all of a sequence or nothing."""

    def remove(self, sequence_id: int, first_position: int, end_position: int = -1) -> bool:
        if first_position > 0 and self.last_position(sequence_id) >= first_position:
            return False
        return super().remove(sequence_id, first_position, end_position)

    def copy(self, source_id: int, target_id: int, first_position: int = 0, end_position: int = -1) -> bool:
        if 0 <= end_position <= self.last_position(source_id):
            self.remove(target_id, 0)
            return False
        return super().copy(source_id, target_id, first_position, end_position)


def test_a_memory_that_cannot_cut_is_computed_again(model: FakeModel, make_engine: MakeEngine) -> None:
    params = ContextParams(n_ctx=256, n_sequences=1, n_batch=32)
    engine = make_engine(Uncuttable(model, params))
    first, other, again = generation(model, 1), generation(model, 1, prompt=PROMPT[:10]), generation(model, 1)
    texts = run(engine, first) + run(engine, other) + run(engine, again)
    assert texts[0] == texts[2]
    assert texts[1] == run(make_engine(context_of(model)), generation(model, 1, prompt=PROMPT[:10]))[0]


def test_a_memory_that_cannot_cut_is_computed_again_though_the_batch_is_full(
    model: FakeModel, make_engine: MakeEngine
) -> None:
    """The returning session gets its stream in a step whose batch another prompt fills."""
    context = Uncuttable(model, ContextParams(n_ctx=256, n_sequences=2, n_batch=8))
    engine = make_engine(context)
    run(engine, generation(model, 1))
    reached, go_on = threading.Event(), threading.Event()
    context.before_decode = lambda _batch: (reached.set(), go_on.wait())
    long = generation(model, 2, prompt=PROMPT * 4)
    engine.submit(long)
    assert reached.wait(30)
    again = generation(model, 1, prompt=PROMPT[:10])
    engine.submit(again)
    go_on.set()
    assert long.wait(30)
    assert again.wait(30)
    assert again.text == run(make_engine(context_of(model)), generation(model, 1, prompt=PROMPT[:10]))[0]


def test_a_fault_while_committing_leaves_no_session_with_wrong_cells(
    model: FakeModel, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run of the step has finished when the other's token cannot be turned into text."""
    [expected] = run(make_engine(context_of(model)), generation(model, 1))
    engine = make_engine(context_of(model))
    calls = []

    def piece(token: int, *, special: bool) -> bytes:
        calls.append(token)
        if len(calls) == 2:
            raise ValueError("no such piece")
        return bytes([token % 256])

    monkeypatch.setattr(model.vocabulary, "piece", piece)
    first, second = generation(model, 1, n_tokens=1), generation(model, 2, prompt=list(b"another prompt"))
    run(engine, first, second)
    monkeypatch.undo()
    assert any(each.error is not None for each in (first, second))
    assert run(engine, generation(model, 3, prompt=PROMPT))
    [again] = run(engine, generation(model, 1))
    assert len(again) == len(expected)
    assert again[1:] == expected[1:]  # the first token's text may come from the piece cache


def test_time_limits_hold_while_a_run_waits_and_while_it_computes_its_prompt(model: FakeModel) -> None:
    now_s = 0.0
    context = context_of(model, n_sequences=1, n_batch=4)

    def tick(_batch: DecodeBatch) -> None:
        nonlocal now_s
        now_s += 1.0

    context.before_decode = tick
    engine = Engine(context, model.vocabulary, lambda: now_s)
    slow, waiting = generation(model, 1, prompt=PROMPT * 9), generation(model, 2)
    slow.limits = waiting.limits = GenerationLimits(n_tokens_max=5, duration_max_s=10.0)
    run(engine, slow, waiting)
    engine.close()
    assert [slow.finish_reason, waiting.finish_reason] == [FinishReason.TIME, FinishReason.TIME]
    assert now_s < 15


def test_cells_are_free_when_forget_returns(model: FakeModel, make_engine: MakeEngine) -> None:
    engine = make_engine(context_of(model))
    run(engine, generation(model, 1), generation(model, 2))
    assert engine.statistics().n_cells_used > 0
    engine.forget_session(1)
    engine.forget_session(2)
    engine.forget_session(2)
    assert engine.statistics().n_cells_used == engine.statistics().n_tokens_cached == 0


@pytest.mark.parametrize("shares_prefixes", [True, False])
def test_without_sharing_nothing_stays_of_a_session(
    model: FakeModel, make_engine: MakeEngine, *, shares_prefixes: bool
) -> None:
    context = context_of(model)
    engine = make_engine(context, EngineOptions(limits=PoolLimits(shares_prefixes=shares_prefixes)))
    run(engine, generation(model, 1))
    engine.forget_session(1)
    assert (context.n_cells_used() > 0) == shares_prefixes


def test_one_session_after_the_other_computes_the_prompt_once(model: FakeModel, make_engine: MakeEngine) -> None:
    engine = make_engine(context_of(model))
    for session_id in range(1, 5):
        each = generation(model, session_id)
        n_tokens_prompt = len(each.request.tokens)
        run(engine, each)
        engine.forget_session(session_id)
        assert each.request.n_tokens_shared == (n_tokens_prompt - 1 if session_id > 1 else 0)
        alone = generation(model, session_id)
        run(make_engine(context_of(model)), alone)
        assert each.text == alone.text


def test_no_batch_is_longer_than_n_batch_and_prompts_do_not_hold_up_generation(
    model: FakeModel, make_engine: MakeEngine
) -> None:
    context = context_of(model, n_batch=16, n_ctx=512)
    batches: list[tuple[int, int]] = []  # tokens, tokens of the first sequence
    started, go_on = threading.Event(), threading.Event()

    def record(batch: DecodeBatch) -> None:
        batches.append((len(batch), batch.sequence_ids.count(0)))
        started.set()
        go_on.wait()

    context.before_decode = record
    engine = make_engine(context)
    short = generation(model, 1, prompt=PROMPT[:8], n_tokens=40)
    long = generation(model, 2, prompt=list(b"long " * 60), n_tokens=2)
    engine.submit(short)
    assert started.wait(30)
    engine.submit(long)
    go_on.set()
    assert long.wait(30)
    assert short.wait(30)
    assert max(size for size, _ in batches) == 16
    # While the long prompt is computed in chunks, each step also carries the running sequence's token.
    chunked = [n_of_first for size, n_of_first in batches if size == 16]
    assert len(chunked) >= 300 // 16
    assert all(n_of_first == 1 for n_of_first in chunked)


def test_closing_ends_everything_that_waits(model: FakeModel, make_engine: MakeEngine) -> None:
    context = context_of(model, n_sequences=1)
    reached, go_on = threading.Event(), threading.Event()
    context.before_decode = lambda _batch: (reached.set(), go_on.wait())
    engine = make_engine(context)
    generations = [generation(model, i) for i in range(3)]
    for each in generations:
        engine.submit(each)
    assert reached.wait(30)
    closer = threading.Thread(target=engine.close)
    closer.start()
    go_on.set()
    closer.join(30)
    assert not closer.is_alive()
    assert all(each.wait(30) and isinstance(each.error, Cancelled) for each in generations)
    assert context.closed
    with pytest.raises(RuntimeFailure, match="closed"):
        engine.submit(generation(model, 9))
    engine.forget_session(1)  # a closed engine has no cells: nothing to do
    engine.close()


def expect_elsewhere(engine: Engine, *session_ids: int) -> None:
    """Announce prompts on another thread, which may submit them while this one waits."""
    announcing = threading.Thread(target=lambda: [engine.expect(session_id) for session_id in session_ids])
    announcing.start()
    announcing.join()


def test_a_batch_waits_for_announced_company_and_no_longer(model: FakeModel, make_engine: MakeEngine) -> None:
    """Announced sessions start in one step, also when they come late; who is alone starts at once."""
    context = context_of(model)
    sizes: list[int] = []
    context.before_decode = lambda batch: sizes.append(len(set(batch.sequence_ids)))
    engine = make_engine(context, options=EngineOptions(company_wait_s=600.0))
    expect_elsewhere(engine, *range(3))
    runs = [generation(model, n, prompt=[65 + n] * 9, n_tokens=2) for n in range(3)]
    engine.submit(runs[0])
    engine.submit(runs[1])
    assert engine.statistics().n_steps == 0
    engine.submit(runs[2])
    assert all(each.wait(30) for each in runs)
    assert sizes[0] == 3
    run(engine, generation(model, 3, n_tokens=2))
    assert sizes[-1] == 1


def test_company_that_does_not_come_is_waited_for_once(model: FakeModel, make_engine: MakeEngine) -> None:
    engine = make_engine(context_of(model), options=EngineOptions(company_wait_s=0.001))
    expect_elsewhere(engine, 77)
    run(engine, generation(model, 1))
    late = make_engine(context_of(model), options=EngineOptions(company_wait_s=600.0))
    expect_elsewhere(late, 77)
    waiting = generation(model, 1)
    late.submit(waiting)
    assert late.statistics().n_steps == 0
    late.dismiss(77)
    assert waiting.wait(30)


def test_nobody_waits_for_what_the_same_thread_has_announced(model: FakeModel, make_engine: MakeEngine) -> None:
    """A guest that has set two prompts computes one after the other."""
    engine = make_engine(context_of(model), options=EngineOptions(company_wait_s=600.0))
    engine.expect(1)
    engine.expect(2)
    run(engine, generation(model, 1))


def test_one_request_at_a_time_when_batches_are_off(model: FakeModel, make_engine: MakeEngine) -> None:
    context = context_of(model)
    sizes: list[int] = []
    context.before_decode = lambda batch: sizes.append(len(set(batch.sequence_ids)))
    engine = make_engine(context, options=EngineOptions(n_running_max=1))
    expected = run(make_engine(context_of(model)), *(generation(model, i) for i in range(3)))
    assert run(engine, *(generation(model, i) for i in range(3))) == expected
    assert set(sizes) == {1}


def test_steps_hold_no_more_tokens_than_they_may(model: FakeModel, make_engine: MakeEngine) -> None:
    context = context_of(model)
    sizes: list[int] = []
    context.before_decode = lambda batch: sizes.append(len(batch))
    run(make_engine(context, options=EngineOptions(n_tokens_step_max=3)), *(generation(model, i) for i in range(3)))
    assert max(sizes) == 3


class Unmovable(FakeContext):
    """Like a memory whose positions cannot be moved."""

    def __init__(self, model: FakeModel, params: ContextParams) -> None:
        super().__init__(model, params)
        self.can_shift = False


def test_a_full_window_is_computed_again_where_cells_cannot_move(model: FakeModel, make_engine: MakeEngine) -> None:
    engine = make_engine(Unmovable(model, ContextParams(n_ctx=64, n_sequences=1, n_batch=32)))
    shifting = generation(model, 1, n_tokens=200, shift=ShiftPolicy(n_keep=4, n_discard=20))
    run(engine, shifting)
    assert (shifting.finish_reason, shifting.n_tokens_output) == (FinishReason.LENGTH, 200)
    assert shifting.request.n_tokens_shifted >= 120
    assert shifting.request.n_tokens_recomputed > 0
