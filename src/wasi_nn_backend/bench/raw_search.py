"""The plain loop in its best setting for a workload: every combination is tried for a moment, the best is kept.

Streams or one unified cache, flash attention on or off, one thread or all. The trial's cells are one prompt's, copied:
what is in them does not change what a step costs.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from wasi_nn_backend.bench.raw_loop import RawLoop
from wasi_nn_backend.bench.workload import N_TAIL, Prompt, Span

TRIAL_S = 0.3
N_TRIALS = 3
#: Who is slower than this share of the best in its first trial is out: the next trials are for those close together.
IN_REACH = 0.85


@dataclass(frozen=True, slots=True)
class RawSetting:
    kv_unified: bool
    flash_attention: bool
    n_threads: int

    def __str__(self) -> str:
        layout = "unified" if self.kv_unified else "streams"
        return f"{layout}{', flash' if self.flash_attention else ''}, {self.n_threads} thr"


@dataclass(frozen=True, slots=True)
class Workload:
    """``n_sequences`` go on from one common ``prompt``, in windows of ``n_ctx`` tokens each."""

    path: Path
    n_sequences: int
    n_ctx: int
    prompt: list[int]


class RawContender:
    """The plain loop among the contenders. All sessions have the workload's prompt in cells of their own."""

    def __init__(self, loop: RawLoop, workload: Workload, setting: RawSetting) -> None:
        self.setting = setting
        self._loop = loop
        self._head = workload.prompt[:-N_TAIL]
        loop.set_n_threads(setting.n_threads)

    def generate(self, prompts: Sequence[Prompt], n_tokens: int) -> list[Span]:
        firsts = self._loop.begin([self._head + prompt.tokens[-N_TAIL:] for prompt in prompts])
        start_s = time.perf_counter()
        self._loop.go_on(firsts, n_tokens - 1)
        end_s = time.perf_counter()
        return [Span(n_tokens, start_s, end_s) for _ in prompts]


class _Trial:
    """One open loop, which is tried with each number of threads."""

    def __init__(self, loop: RawLoop, workload: Workload) -> None:
        self._loop = loop
        self._n_context = len(workload.prompt)
        self._n_steps_max = workload.n_ctx - self._n_context
        self._firsts = loop.begin_alike(workload.prompt)

    def tokens_per_s(self, n_threads: int, given_up_below: float) -> float:
        """Steps for ``TRIAL_S``; a first step is not counted unless it is so slow that it tells enough."""
        self._loop.set_n_threads(n_threads)
        self._loop.cut(self._n_context)
        rate, n_steps = 0.0, 0
        start_s = time.perf_counter()
        lasts = self._step(self._firsts)
        first_rate = len(lasts) / (time.perf_counter() - start_s)
        if first_rate < given_up_below / 2:
            return first_rate
        start_s = time.perf_counter()
        while n_steps < 2 or (time.perf_counter() - start_s < TRIAL_S and n_steps < self._n_steps_max - 1):
            lasts = self._step(lasts)
            n_steps += 1
            rate = n_steps * len(lasts) / (time.perf_counter() - start_s)
        return rate

    def _step(self, lasts: list[int]) -> list[int]:
        return [tokens[0] for tokens in self._loop.go_on(lasts, 1)]


@contextlib.contextmanager
def best_raw(workload: Workload, n_threads_max: int) -> Iterator[tuple[RawContender, dict[str, float]]]:
    """The plain loop in its best setting, and what the trials of each setting gave, in tokens per second."""
    with contextlib.ExitStack() as stack:
        loops: dict[tuple[bool, bool], RawLoop] = {}
        rates: dict[RawSetting, list[float]] = {}
        trials: dict[RawSetting, _Trial] = {}
        for layout in layouts(workload):
            loops[layout] = stack.enter_context(open_loop(workload, *layout, n_threads_max))
            trial = _Trial(loops[layout], workload)
            for n_threads in sorted({1, n_threads_max}, reverse=True):
                setting = RawSetting(*layout, n_threads)
                best = max((each[0] for each in rates.values()), default=0.0)
                rates[setting], trials[setting] = [trial.tokens_per_s(n_threads, best)], trial
        winner = play_finals(rates, trials)
        kept = loops[winner.kv_unified, winner.flash_attention]
        for loop in loops.values():
            if loop is not kept:
                loop.close()
        medians = {str(setting): statistics.median(each) for setting, each in rates.items()}
        yield RawContender(kept, workload, winner), medians


def layouts(workload: Workload) -> list[tuple[bool, bool]]:
    """(unified, flash attention). One sequence has one stream either way."""
    return list(itertools.product((False, True) if workload.n_sequences > 1 else (False,), (False, True)))


def open_loop(workload: Workload, kv_unified: bool, flash_attention: bool, n_threads: int) -> RawLoop:
    return RawLoop(
        workload.path,
        n_sequences=workload.n_sequences,
        n_ctx=workload.n_ctx,
        n_threads=n_threads,
        kv_unified=kv_unified,
        flash_attention=flash_attention,
    )


def play_finals(rates: dict[RawSetting, list[float]], trials: dict[RawSetting, _Trial]) -> RawSetting:
    """Try those that came close to the best again, in turn; the best median wins."""
    best = max(each[0] for each in rates.values())
    finalists = [setting for setting, each in rates.items() if each[0] >= IN_REACH * best]
    for _ in range(N_TRIALS - 1 if len(finalists) > 1 else 0):
        for setting in finalists:
            rates[setting].append(trials[setting].tokens_per_s(setting.n_threads, 0.0))
    return max(finalists, key=lambda setting: statistics.median(rates[setting]))
