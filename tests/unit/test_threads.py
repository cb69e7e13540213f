"""The choice of thread counts, on simulated machines: what it costs beside the best fixed number, and how fast it is.

A machine is a pure function from threads and time to a step's duration, times noise from a seeded generator. Efficiency
compares expected durations: the noise that a run happened to meet is nobody's merit.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import n_examples
from tests.fakes.llama import FakeContext, FakeLlama
from wasi_nn_backend.config import parse_layer, resolve
from wasi_nn_backend.engine import Engine, EngineOptions, EngineStore, Generation, GenerationLimits
from wasi_nn_backend.engine.threads import ThreadTuner, thread_counts
from wasi_nn_backend.llama.interface import Context, ContextParams, DecodeBatch, Greedy, ModelParams, Vocabulary
from wasi_nn_backend.scheduler import Request

#: Seconds of a step with this many threads at this time.
Machine = Callable[[int, float], float]
SEEDS = range(4)

# SmolLM2 on two cores, seconds a step with one and two threads, as measured.
QUIET = {1: (0.0138, 0.0101), 8: (0.0860, 0.0544)}
BUSY = {1: (0.0137, 0.0238), 8: (0.0870, 0.1050)}


def two_cores(n_sequences: int, *, busy: Callable[[float], bool]) -> Machine:
    return lambda n_threads, now_s: (BUSY if busy(now_s) else QUIET)[n_sequences][n_threads - 1]


def cores(n_cores: int, n_busy: int, *, step_s: float = 0.1, wait_s: float = 0.0005) -> Machine:
    """Perfectly divisible work; a thread that shares its core takes twice as long and everybody waits for it."""
    return lambda n_threads, _: step_s / n_threads * (2 if n_threads + n_busy > n_cores else 1) + wait_s * n_threads


def memory_bound(n_threads: int, now_s: float) -> float:
    return max(0.02 / n_threads, 0.005)


def best_at_eight(n_threads: int, now_s: float) -> float:
    return 0.04 / n_threads**0.9 + 0.0004 * n_threads


@dataclass
class Result:
    steps: list[tuple[float, int]]  # (start, threads)
    spent_s: float  # expected durations of what was chosen
    fixed_s: dict[int, float]  # expected durations of the same steps with a fixed number
    best_s: float  # with the best number for each step

    @property
    def efficiency(self) -> float:
        return min(self.fixed_s.values()) / self.spent_s

    def share(self, n_threads: int, from_s: float, to_s: float) -> float:
        chosen = [n for start_s, n in self.steps if from_s <= start_s < to_s]
        return chosen.count(n_threads) / len(chosen)


def simulate(  # noqa: PLR0913 - the knobs of a simulation
    machine: Machine,
    n_cores: int,
    *,
    duration_s: float = 30.0,
    n_tokens: int = 8,
    prompt: bool = False,
    noise: float = 0.05,
    outliers: float = 0.0,
    seed: int = 0,
) -> Result:
    """``noise`` is the standard deviation of a step's logarithm; ``outliers`` the share of steps that take ten times as
    long."""
    rng = random.Random(seed)
    tuner = ThreadTuner(n_cores)
    result = Result([], 0.0, dict.fromkeys(thread_counts(n_cores), 0.0), 0.0)
    now_s = 0.0
    while now_s < duration_s:
        n_threads = tuner.choose(n_tokens, prompt=prompt, now_s=now_s)
        expected_s = machine(n_threads, now_s)
        result.steps.append((now_s, n_threads))
        result.spent_s += expected_s
        for n in result.fixed_s:
            result.fixed_s[n] += machine(n, now_s)
        result.best_s += min(machine(n, now_s) for n in result.fixed_s)
        step_s = expected_s * rng.lognormvariate(0, noise) * (10 if rng.random() < outliers else 1)
        tuner.observe(step_s)
        now_s += step_s
    return result


def never(_: float) -> bool:
    return False


def always(_: float) -> bool:
    return True


QUIET_MACHINES = {
    "one sequence": (two_cores(1, busy=never), 2),
    "eight sequences": (two_cores(8, busy=never), 2),
    "four cores": (cores(4, 0), 4),
    "64 cores, all of use": (cores(64, 0, step_s=0.3, wait_s=0.00001), 64),
    "64 cores, eight of use": (best_at_eight, 64),
    "memory-bound": (memory_bound, 8),
    "memory-bound, 64 cores": (memory_bound, 64),
}
BUSY_MACHINES = {
    "one sequence": (two_cores(1, busy=always), 2),
    "eight sequences": (two_cores(8, busy=always), 2),
    "four cores, one busy": (cores(4, 1), 4),
    "eight cores, one busy": (cores(8, 1), 8),
    "eight cores, two busy": (cores(8, 2), 8),
    "64 cores, one busy": (cores(64, 1, step_s=1.0), 64),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("machine", "n_cores"), QUIET_MACHINES.values(), ids=QUIET_MACHINES.keys())
def test_a_quiet_machine_keeps_its_speed(machine: Machine, n_cores: int, seed: int) -> None:
    assert simulate(machine, n_cores, seed=seed).efficiency >= 0.95


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("machine", "n_cores"), BUSY_MACHINES.values(), ids=BUSY_MACHINES.keys())
def test_a_busy_machine_gets_nearly_the_best_number(machine: Machine, n_cores: int, seed: int) -> None:
    assert simulate(machine, n_cores, seed=seed).efficiency >= 0.9


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n_sequences", [1, 8])
@pytest.mark.parametrize("busy", [never, always])
def test_noise_is_not_mistaken_for_speed(busy: Callable[[float], bool], n_sequences: int, seed: int) -> None:
    """Steps vary by 15 %, or one in twenty takes ten times as long."""
    machine = two_cores(n_sequences, busy=busy)
    assert simulate(machine, 2, n_tokens=n_sequences, noise=0.15, seed=seed).efficiency >= 0.92
    assert simulate(machine, 2, n_tokens=n_sequences, outliers=0.05, seed=seed).efficiency >= 0.9


@pytest.mark.parametrize("n_sequences", [1, 8])
def test_trials_cost_a_quiet_machine_at_most_two_percent(n_sequences: int) -> None:
    result = simulate(two_cores(n_sequences, busy=never), 2, n_tokens=n_sequences, noise=0.0, duration_s=60)
    assert 0 < result.spent_s - result.best_s <= 0.02 * result.spent_s


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n_sequences", [1, 8])
def test_it_yields_within_a_second_and_comes_back_within_three(n_sequences: int, seed: int) -> None:
    """A neighbour computes from the 10th to the 20th second. At most one step in seven is still a trial afterwards."""
    machine = two_cores(n_sequences, busy=lambda now_s: 10 <= now_s < 20)
    result = simulate(machine, 2, n_tokens=n_sequences, seed=seed)
    assert result.share(2, 5, 10) >= 0.85
    assert result.share(1, 11, 20) >= 0.85
    assert result.share(2, 23, 30) >= 0.85


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n_sequences", [1, 8])
def test_a_neighbour_that_comes_and_goes(n_sequences: int, seed: int) -> None:
    """Every five seconds: better than any fixed number."""
    machine = two_cores(n_sequences, busy=lambda now_s: int(now_s / 5) % 2 == 1)
    assert simulate(machine, 2, n_tokens=n_sequences, duration_s=60, seed=seed).efficiency >= 1.0


def test_a_pause_in_the_work_does_not_hide_a_change() -> None:
    """Beside a neighbour until the pause, alone after it: one thread's steps take equally long in both."""
    tuner = ThreadTuner(2)
    now_s, chosen = 0.0, []
    for _ in range(300):
        chosen.append(tuner.choose(1, prompt=False, now_s=now_s))
        step_s = BUSY[1][chosen[-1] - 1]
        tuner.observe(step_s)
        now_s += step_s
    assert chosen[-50:].count(1) >= 45
    now_s += 60
    chosen.clear()
    for _ in range(30):
        chosen.append(tuner.choose(1, prompt=False, now_s=now_s))
        step_s = QUIET[1][chosen[-1] - 1]
        tuner.observe(step_s)
        now_s += step_s
    assert chosen[-10:] == [2] * 10


def test_prompts_follow_when_generating_has_found_out_that_the_machine_is_busy() -> None:
    """A prompt after every 25 tokens of each of eight sequences; a neighbour computes from the 10th second on."""
    machine = two_cores(8, busy=lambda now_s: 10 <= now_s < 20)
    tuner, now_s = ThreadTuner(2), 0.0
    prompts: list[tuple[float, int]] = []
    for step in itertools.count():
        if now_s >= 30:
            break
        is_prompt = step % 26 == 0
        n_threads = tuner.choose(160 if is_prompt else 8, prompt=is_prompt, now_s=now_s)
        step_s = machine(n_threads, now_s) * (10 if is_prompt else 1)
        if is_prompt:
            prompts.append((now_s, n_threads))
        tuner.observe(step_s)
        now_s += step_s
    assert {n for start_s, n in prompts if start_s < 10} == {2}
    assert {n for start_s, n in prompts if 12 <= start_s < 20} == {1}
    assert {n for start_s, n in prompts if start_s >= 23} == {2}


def test_drift_is_no_reason_to_try_fewer_threads() -> None:
    """A machine that becomes a quarter slower and faster again every second."""

    def drifting(n_threads: int, now_s: float) -> float:
        return QUIET[8][n_threads - 1] * (1.25 if int(now_s) % 2 else 1.0)

    result = simulate(drifting, 2, noise=0.0, duration_s=60)
    assert sum(n == 1 for _, n in result.steps) <= 12, "those at the beginning and one in eight seconds"


def test_steps_of_seconds_are_no_pauses() -> None:
    """As where two processes are in each other's way. A few steps, and it goes over to one thread."""
    tuner, now_s, chosen = ThreadTuner(2), 0.0, []
    for _ in range(12):
        chosen.append(tuner.choose(4, prompt=False, now_s=now_s))
        step_s = 3.0 if chosen[-1] == 2 else 0.05
        tuner.observe(step_s)
        now_s += step_s
    assert chosen == [2] * 3 + [1] * 9


def test_after_a_pause_all_threads_are_tried_and_fewer_only_when_steps_are_slower() -> None:
    tuner = ThreadTuner(2)
    now_s, chosen = 0.0, []
    for _ in range(10):
        for _ in range(30):
            chosen.append(tuner.choose(8, prompt=False, now_s=now_s))
            step_s = QUIET[8][chosen[-1] - 1]
            tuner.observe(step_s)
            now_s += step_s
        now_s += 60
    assert chosen.count(1) <= 5, "more than there are without pauses"


def test_prompts_are_not_experimented_with_before_they_have_paid_for_it() -> None:
    result = simulate(cores(2, 0, step_s=1.0), 2, n_tokens=512, prompt=True, duration_s=200, noise=0.05)
    assert all(n == 2 for start_s, n in result.steps if start_s < 12)
    assert result.efficiency >= 0.98
    assert any(n == 1 for _, n in result.steps)


def test_prompts_and_batches_of_other_sizes_have_their_own_number() -> None:
    """Single tokens gain nothing from the second core here, batches and prompts twice the speed."""
    tuner = ThreadTuner(2)
    now_s = 0.0
    chosen: dict[tuple[int, bool], list[int]] = {}
    for i in range(900):
        kind = (1, False) if i % 9 else (512, True)
        kind = (8, False) if i % 9 >= 5 else kind
        n_threads = tuner.choose(kind[0], prompt=kind[1], now_s=now_s)
        chosen.setdefault(kind, []).append(n_threads)
        step_s = 0.01 * n_threads if kind == (1, False) else 0.0005 * kind[0] / n_threads
        tuner.observe(step_s)
        now_s += step_s
    assert {kind: max(set(numbers[-50:]), key=numbers[-50:].count) for kind, numbers in chosen.items()} == {
        (1, False): 1,
        (8, False): 2,
        (512, True): 2,
    }


def test_a_new_size_starts_with_what_a_similar_one_found() -> None:
    tuner = ThreadTuner(64)
    now_s = 0.0
    for _ in range(1000):
        step_s = best_at_eight(tuner.choose(4, prompt=False, now_s=now_s), now_s)
        tuner.observe(step_s)
        now_s += step_s
    assert 4 <= tuner.choose(6, prompt=False, now_s=now_s) <= 16


@given(st.integers(1, 512))
def test_the_numbers_tried_are_few_and_reach_from_one_to_all(n_threads_max: int) -> None:
    counts = thread_counts(n_threads_max)
    assert counts[0] == 1
    assert counts[-1] == n_threads_max
    assert max(1, n_threads_max - 1) in counts
    assert list(counts) == sorted(set(counts))
    assert len(counts) <= 2 * n_threads_max.bit_length() + 2
    assert all(high <= 2 * low for low, high in itertools.pairwise(counts))


@settings(max_examples=n_examples(50))
@given(
    n_threads_max=st.integers(1, 64),
    steps=st.lists(
        st.tuples(st.integers(1, 600), st.booleans(), st.floats(0, 100), st.floats(0, 10), st.booleans()), max_size=300
    ),
)
def test_any_course_of_steps_gives_a_valid_number_and_the_same_one_again(
    n_threads_max: int, steps: list[tuple[int, bool, float, float, bool]]
) -> None:
    """Durations of zero, pauses, steps that are never observed: nothing fails, and no clock or dice are inside."""
    tuners = ThreadTuner(n_threads_max), ThreadTuner(n_threads_max)
    now_s = 0.0
    for n_tokens, prompt, step_s, pause_s, observed in steps:
        numbers = [tuner.choose(n_tokens, prompt=prompt, now_s=now_s) for tuner in tuners]
        assert numbers[0] == numbers[1]
        assert numbers[0] in thread_counts(n_threads_max)
        now_s += step_s + pause_s
        for tuner in tuners:
            if observed:
                tuner.observe(step_s)


def engine_run(
    tmp_path: Path, options: EngineOptions, *, n_threads_single: int | None = None, n_generations: int = 1
) -> list[int]:
    """The number of threads at each decode of runs on a fake machine where one thread is the fastest."""
    path = tmp_path / "model.gguf"
    path.touch()
    model = FakeLlama().load_model(ModelParams(path))
    context = FakeContext(model, ContextParams(n_ctx=256, n_sequences=n_generations, n_batch=32, n_threads=4))
    context.n_threads_single = n_threads_single
    now_s, numbers = 0.0, []

    def pass_time(batch: DecodeBatch) -> None:
        nonlocal now_s
        is_fixed = n_threads_single is not None and len(batch) == 1
        numbers.append(n_threads_single if is_fixed else context.n_threads)
        now_s += 0.01 * numbers[-1]

    context.before_decode = pass_time
    engine = Engine(context, model.vocabulary, lambda: now_s, options)
    try:
        generations = [
            Generation(
                Request(id=number, session_id=number, tokens=list(b"a prompt")),
                model.create_sampler([Greedy()]),
                GenerationLimits(n_tokens_max=200),
                streams=False,
            )
            for number in range(1, n_generations + 1)
        ]
        for generation in generations:
            engine.submit(generation)
        assert all(generation.wait(30) for generation in generations)
    finally:
        engine.close()
    return numbers


def test_the_engine_uses_the_number_that_was_chosen(tmp_path: Path) -> None:
    numbers = engine_run(tmp_path, EngineOptions(n_threads_max=4))
    assert numbers[0] == 4
    assert numbers[-50:].count(1) >= 40


def test_single_tokens_keep_their_number_where_another_would_change_the_text(tmp_path: Path) -> None:
    assert set(engine_run(tmp_path, EngineOptions(n_threads_max=4), n_threads_single=4)) == {4}
    # Two tokens in a batch are free.
    numbers = engine_run(tmp_path, EngineOptions(n_threads_max=4), n_threads_single=4, n_generations=2)
    assert numbers[-50:].count(1) >= 40


def test_a_fixed_number_stays(tmp_path: Path) -> None:
    assert set(engine_run(tmp_path, EngineOptions())) == {4}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({}, 3),
        ({"threads": "auto"}, 3),
        ({"threads": 1}, 1),
        ({"threads": 2}, 1),
        ({"flash_attention": "on"}, 3),
    ],
)
def test_only_the_automatic_number_adapts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, int | str], expected: int
) -> None:
    """Through the store, as graphs get their engines."""
    given_options = []

    class Recording(Engine):
        def __init__(
            self,
            context: Context,
            vocabulary: Vocabulary,
            clock: Callable[[], float],
            options: EngineOptions,
            **others: Any,
        ) -> None:
            given_options.append(options)
            super().__init__(context, vocabulary, clock, options, **others)

    monkeypatch.setattr("wasi_nn_backend.engine.sizing.n_usable_cores", lambda: 3)
    monkeypatch.setattr("wasi_nn_backend.engine.store.Engine", Recording)
    path = tmp_path / "model.gguf"
    path.touch()
    EngineStore(FakeLlama(), time.monotonic).acquire(
        path, resolve([parse_layer({"model": model}, name="test")])
    ).release()
    assert [options.n_threads_max for options in given_options] == [expected]
