"""The order and the limits of the measurement, on the fake; ``tests/real/test_attention_probe.py`` has llama.cpp."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from tests.fakes.llama import FakeContext, FakeLlama
from wasi_nn_backend.errors import RuntimeFailure
from wasi_nn_backend.llama.attention_probe import N_ROUNDS, AttentionOption, AttentionWork, Samples, measure
from wasi_nn_backend.llama.interface import ContextParams, Model, ModelParams

OFF, ON = AttentionOption("streams", "off"), AttentionOption("streams", "on")
UNIFIED = AttentionOption("unified", "off")
WORK = AttentionWork(2, 1, 32, n_tokens=300, n_sequences=3, n_threads=1, cache_type_k="f16", cache_type_v="f16")


class Bench(FakeLlama):
    """A llama with a clock that decodes move: by ``step_s``, and by ten times that with flash attention."""

    def __init__(self, step_s: float = 0.001) -> None:
        super().__init__()
        self.step_s = step_s
        self.now_s = 0.0
        self.n_contexts_max = 10

    def load(self, path: Path) -> Model:
        model = self.load_model(ModelParams(path))
        create = model.create_context

        def create_context(params: ContextParams) -> FakeContext:
            if len(model.contexts) == self.n_contexts_max:
                raise RuntimeFailure("no memory")
            context = create(params)
            context.before_decode = lambda _batch: self._pass(params)
            return context

        model.create_context = create_context  # type: ignore[method-assign]
        return model

    def _pass(self, params: ContextParams) -> None:
        self.now_s += self.step_s * (10 if params.flash_attention == "on" else 1)

    @property
    def contexts(self) -> list[FakeContext]:
        return self.models[-1].contexts

    def measure(self, options: tuple[AttentionOption, ...], budget_s: float = 100.0) -> Samples:
        return measure(WORK, options, self.load, lambda: self.now_s, budget_s)


def test_every_option_is_filled_alike_and_timed() -> None:
    bench = Bench()
    samples = bench.measure((OFF, UNIFIED))
    assert {option: len(times) for option, times in samples.items()} == {OFF: N_ROUNDS, UNIFIED: N_ROUNDS}
    assert all(time == pytest.approx(bench.step_s) for times in samples.values() for time in times)
    streams, unified = bench.contexts
    assert streams.n_sequences == WORK.n_sequences
    assert unified.params.kv_layout == "unified"
    n_stepped = 1 + N_ROUNDS
    assert streams.n_cells_used() == WORK.n_sequences * (WORK.n_tokens + n_stepped)
    # Cells of its own for every sequence, and for those that do not run.
    assert unified.n_cells_used() == WORK.n_sequences * (2 * WORK.n_tokens + n_stepped)


def test_all_is_closed_and_the_file_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    bench = Bench()
    bench.measure((OFF, ON))
    assert bench.models[-1].closed
    assert all(context.closed for context in bench.contexts)
    assert list(tmp_path.iterdir()) == []


def test_who_has_lost_is_not_timed_on() -> None:
    samples = Bench().measure((OFF, ON))
    assert len(samples[ON]) < N_ROUNDS
    assert min(samples[ON]) > min(samples[OFF])


@pytest.mark.parametrize(("budget_s", "n_options"), [(0.0, 1), (0.0089, 1), (0.0091, 2), (0.0136, 3)])
def test_a_budget_ends_it(budget_s: float, n_options: int) -> None:
    """Preparing takes three decodes, two of the prompt and a step. Another is begun where it should end in time."""
    samples = Bench(step_s=0.0015).measure((OFF, UNIFIED, ON), budget_s)
    assert list(samples) == [OFF, UNIFIED, ON][:n_options]
    assert all(len(times) == 5 for times in samples.values())


def test_a_fault_closes_what_is_open() -> None:
    bench = Bench()
    bench.n_contexts_max = 1
    with pytest.raises(RuntimeFailure):
        bench.measure((OFF, ON))
    assert bench.models[-1].closed
    assert [context.closed for context in bench.contexts] == [True]
