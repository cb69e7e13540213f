"""The engine when things go wrong in the library, and its promises about batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fakes.llama import FakeContext, FakeLlama, FakeModel
from wasi_nn_backend.engine import Engine, Generation, GenerationLimits
from wasi_nn_backend.errors import Cancelled, RuntimeFailure
from wasi_nn_backend.llama.interface import ContextParams, DecodeBatch, DecodeStatus, Greedy, ModelParams
from wasi_nn_backend.output import FinishReason
from wasi_nn_backend.scheduler import Request

PROMPT = list(b"the prompt of a test")


@pytest.fixture
def model(tmp_path: Path) -> FakeModel:
    path = tmp_path / "model.gguf"
    path.touch()
    return FakeLlama().load_model(ModelParams(path))


MakeEngine = Callable[[FakeContext], Engine]


@pytest.fixture
def make_engine(model: FakeModel) -> Iterator[MakeEngine]:
    engines: list[Engine] = []

    def make(context: FakeContext) -> Engine:
        engines.append(Engine(context, model.vocabulary, time.monotonic))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def context_of(model: FakeModel, **params: int) -> FakeContext:
    return model.create_context(ContextParams(**({"n_ctx": 256, "n_sequences": 4, "n_batch": 32} | params)))


def generation(model: FakeModel, number: int, *, prompt: list[int] = PROMPT, n_tokens: int = 20) -> Generation:
    request = Request(id=number, session_id=number, tokens=[*prompt, ord("0") + number % 10])
    return Generation(request, model.create_sampler([Greedy()]), GenerationLimits(n_tokens_max=n_tokens), streams=False)


def run(engine: Engine, *generations: Generation) -> list[bytes]:
    for each in generations:
        engine.submit(each)
    for each in generations:
        assert each.wait(30)
    return [each.text for each in generations]


class Faulty(FakeContext):
    """Fails one decode in the way a test asks for."""

    fault: DecodeStatus | Exception | None = None

    def decode(self, batch: DecodeBatch) -> DecodeStatus:
        fault, self.fault = self.fault, None
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
    context = Faulty(model, ContextParams(n_ctx=256, n_sequences=4, n_batch=32))
    engine = make_engine(context)
    [expected] = run(engine, generation(model, 1))
    context.fault = fault
    struck = generation(model, 2)
    run(engine, struck)
    assert struck.finish_reason is FinishReason.ERROR
    assert isinstance(struck.error, RuntimeFailure)
    assert run(engine, generation(model, 1)) == [expected]
    [again] = run(engine, generation(model, 2))
    assert again == run(make_engine(context_of(model)), generation(model, 2))[0]


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


def test_cells_are_gone_when_forget_returns(model: FakeModel, make_engine: MakeEngine) -> None:
    context = context_of(model)
    engine = make_engine(context)
    run(engine, generation(model, 1), generation(model, 2))
    assert context.n_cells_used() > 0
    engine.forget_session(1)
    engine.forget_session(2)
    engine.forget_session(2)
    assert context.n_cells_used() == 0


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
