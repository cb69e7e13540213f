"""How many threads the next decode gets, found out while running.

Decode threads wait for each other some thousand times a token, so one that shares its core with a busy process holds
up all of them: with SmolLM2 on two cores, two threads are 1.4 times as fast as one on a quiet machine and 0.6 times as
fast beside one busy process. Load averages are too slow to tell and containers often have none that is true, so the
durations of the steps themselves are the signal. Pure: time comes in with the calls.

The tuner keeps a choice for each kind of step, and now and then gives a step to a neighbouring number instead:

- Such a trial ends with its first step unless that was faster, and needs three to eight steps to win.
- Trials are paid for. A kind earns a share of the time that it computes, and what a trial takes longer than the
  current choice would have is its price: so a quiet machine loses that share at most, whatever there is to try.
- They are rarer the longer nothing changes, and due at once when three steps in a row differ from what was usual.
- Fewer threads than all are seldom tried without a reason: that they would be better now shows in the steps, which
  become slower. More are, since one thread's steps take as long as before when a core for a second one becomes free.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

__all__ = ["ThreadTuner", "thread_counts"]

#: The share of a kind's time that trials may cost.
_TRIAL_SHARE = 0.0175
#: In steps: what a kind may save up, what it may owe, and the most that one step is charged. A step that took ten times
#: as long was in somebody's way, and would have been under the current choice too: paying for it in full would end the
#: trials for minutes on a busy machine, which needs them most.
_SAVINGS_MAX = 4.0
_DEBT_MAX = 1.0
_CHARGE_MAX = 1.0
#: In steps: the least that a trial's step is charged, or numbers that are equally good would be tried all the time.
_CHARGE_MIN = 0.1
#: In steps: the price of what was never tried.
_CHARGE_UNKNOWN = 0.5
_N_COSTS = 8
_N_COSTS_MIN = 3
#: Three steps in a row this much slower or faster mean that the machine or the work has changed. A busy process makes
#: those that are held up twice as long; a machine's own drift is less than a third.
_CHANGE_SLOWER = 1.3
_CHANGE_FASTER = 1.15
#: Relative cost below which a trial goes on, and that with which it wins, at once or after its last step.
_PROMISING = 0.95
_CLEARLY_BETTER = 0.85
#: The share of pairs of a trial's step and a usual one in which a winning trial's must be the faster one. Medians of
#: so few steps are not enough: where one step in ten takes ten times as long, they often say what is not so.
_FASTER_SHARE = 0.85
_N_TRIAL_MIN = 3
_N_TRIAL_MAX = 8
_INTERVAL_MIN_S = 0.125
_INTERVAL_MAX_S = 1.0
#: With all threads, where fewer were slower by more than this.
_INTERVAL_AT_BEST_MAX_S = 16.0
_CLEARLY_WORSE = 0.2
#: What was measured before a pause of this length says little about the machine now.
_STALE_S = 2.0


def thread_counts(n_threads_max: int) -> tuple[int, ...]:
    """The numbers worth trying, ascending: a half or two thirds apart, and one less than all.

    The last leaves one core to the one process that computes beside the engine; with eight cores it is 1.75 times as
    fast as four threads then.
    """
    counts = {1, n_threads_max, max(1, n_threads_max - 1)}
    power = 1
    while power < n_threads_max:
        counts |= {power, min(power * 3 // 2, n_threads_max)}
        power *= 2
    return tuple(sorted(counts))


class ThreadTuner:
    """Chooses from 1 to ``n_threads_max`` threads for each decode. For one thread's use; deterministic."""

    def __init__(self, n_threads_max: int) -> None:
        self._counts = thread_counts(n_threads_max)
        self._kinds: dict[tuple[bool, int], _Kind] = {}
        self._chosen: tuple[_Kind, int] | None = None

    def choose(self, n_tokens: int, *, prompt: bool, now_s: float) -> int:
        """The number of threads for the next step, of ``n_tokens`` tokens; ``prompt``: some are of prompts."""
        key = prompt, _size_class(n_tokens)
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind(len(self._counts), self._inherited(key), prompt=prompt)
        self._chosen = kind, n_tokens
        return self._counts[kind.choose(now_s)]

    def observe(self, duration_s: float) -> None:
        """What the step that was chosen for last took. Leave it out for steps that did something else as well."""
        chosen, self._chosen = self._chosen, None
        if chosen is None or duration_s <= 0:
            return
        kind, n_tokens = chosen
        old = kind.index
        if kind.observe(n_tokens, duration_s):
            for other in self._kinds.values():
                if other.index == old:  # the machine has changed, and that one would find it out much later
                    other.follow(kind.index)

    def _inherited(self, key: tuple[bool, int]) -> int:
        """A new kind starts with the choice of the most similar one, the first one with all cores."""
        prompt, size = key
        alike = {abs(other - size): kind for (is_prompt, other), kind in self._kinds.items() if is_prompt is prompt}
        return alike[min(alike)].index if alike else len(self._counts) - 1


def _size_class(n_tokens: int) -> int:
    """Batches within half an octave: 1, 2, 3, 4, 5-6, 7-9, 10-13, 14-19 and so on."""
    return round(2 * math.log2(max(1, n_tokens)))


def _faster_share(costs: Sequence[float], others: Sequence[float]) -> float:
    """In how many of all pairs the first one's cost is the lower one, 0 to 1 (the Mann-Whitney statistic)."""
    return fmean(cost < other for cost in costs for other in others)


@dataclass(slots=True)
class _Trial:
    index: int
    is_for_change: bool  # steps had become slower
    costs: list[float] = field(default_factory=list)


class _Kind:
    """One kind of step: the index of its thread count, and what is known about others. Costs are seconds a token."""

    def __init__(self, n_counts: int, index: int, *, prompt: bool) -> None:
        self.index = index
        self._n_counts = n_counts
        self._debt_max = 0.0 if prompt else _DEBT_MAX  # a prompt's step is long: nobody waits for an experiment
        self._costs: deque[float] = deque(maxlen=_N_COSTS)  # of the current choice
        self._usual: float | None = None  # what later costs are compared with
        self._trial: _Trial | None = None
        self._due = self._neighbours(-1)  # to try as soon as it can be paid for
        self._is_slower = False  # that is why they are due
        self._turn = 0
        self._excess: dict[int, float] = {}  # by index: how much longer a step took than with the current choice
        self._savings_s = 0.0
        self._step_s = 0.0
        self._last_s = math.inf  # end of the last step, or its start where nobody measured it
        self._active_s = 0.0  # all of its steps: intervals count in it, so that a pause does not make a trial due
        self._interval_s = _INTERVAL_MIN_S
        self._next_trial_s = 0.0

    def choose(self, now_s: float) -> int:
        if now_s - self._last_s > _STALE_S:
            self._trial = None
            self._costs.clear()
            self._expect_change(self._more_threads())
        self._last_s = now_s
        if self._trial is None:
            self._start_trial()
        return self.index if self._trial is None else self._trial.index

    def _start_trial(self) -> None:
        if len(self._costs) < _N_COSTS_MIN or self._n_counts == 1:
            return
        if self._due:
            if self._can_pay(self._due[0], self._debt_max):
                self._trial = _Trial(self._due.pop(0), self._is_slower)
        elif self._active_s >= self._next_trial_s:
            candidates = self._neighbours(1)
            candidate = candidates[self._turn % len(candidates)]
            if self._can_pay(candidate, 0.0):
                self._turn += 1
                self._trial = _Trial(candidate, is_for_change=False)

    def _can_pay(self, index: int, debt_max: float) -> bool:
        price = min(_CHARGE_MAX, max(_CHARGE_MIN, self._excess.get(index, _CHARGE_UNKNOWN)))
        return self._savings_s + debt_max * self._step_s >= price * self._step_s

    def observe(self, n_tokens: int, duration_s: float) -> bool:
        """True when the number has changed since the machine has: to fewer after steps became slower, or to more."""
        cost = duration_s / n_tokens
        self._active_s += duration_s
        self._last_s += duration_s
        self._savings_s += _TRIAL_SHARE * duration_s
        if self._trial is not None:
            self._step_s = median(self._costs) * n_tokens
            excess_s = min(duration_s - self._step_s, _CHARGE_MAX * self._step_s)
            self._savings_s -= max(excess_s, _CHARGE_MIN * self._step_s)
            self._trial.costs.append(cost)
            return self._judge(self._trial)
        self._costs.append(cost)
        self._step_s = median(self._costs) * n_tokens
        self._savings_s = min(self._savings_s, _SAVINGS_MAX * self._step_s)
        self._notice_change()
        return False

    def follow(self, index: int) -> None:
        """Take over what another kind has found out."""
        self.index = index
        self._costs.clear()
        self._usual = self._trial = None
        self._excess = {}
        self._expect_change(self._more_threads())

    def _notice_change(self) -> None:
        if len(self._costs) < _N_COSTS_MIN:
            return
        if self._usual is None:
            self._usual = median(self._costs)
            return
        recent = list(self._costs)[-_N_COSTS_MIN:]
        slower, faster = min(recent) > self._usual * _CHANGE_SLOWER, max(recent) < self._usual / _CHANGE_FASTER
        if slower or faster:
            self._costs = deque(recent, maxlen=_N_COSTS)
            self._usual = median(recent)
            self._expect_change(self._neighbours(-1) if slower else self._more_threads(), is_slower=slower)

    def _expect_change(self, due: list[int], *, is_slower: bool = False) -> None:
        self._due = due
        self._is_slower = is_slower
        if due:
            self._interval_s = _INTERVAL_MIN_S

    def _judge(self, trial: _Trial) -> bool:
        """Go on with the trial, end it, or change to its number; returns what ``observe`` does."""
        old, n_steps = self.index, len(trial.costs)
        ratio = median(trial.costs) / median(self._costs)
        enough = _CLEARLY_BETTER if n_steps < _N_TRIAL_MAX else _PROMISING
        if n_steps >= _N_TRIAL_MIN and ratio < enough and _faster_share(trial.costs, self._costs) >= _FASTER_SHARE:
            self._change_to(trial, ratio)
            return trial.is_for_change or trial.index > old
        if n_steps == _N_TRIAL_MAX or ratio >= (1.0 if n_steps == 1 else _PROMISING):
            self._end_trial(trial, ratio)
        return False

    def _end_trial(self, trial: _Trial, ratio: float) -> None:
        self._trial = None
        self._excess[trial.index] = ratio - 1
        if not self._due:
            at_best = not self._more_threads() and all(excess > _CLEARLY_WORSE for excess in self._excess.values())
            factor, interval_max_s = (4, _INTERVAL_AT_BEST_MAX_S) if at_best else (2, _INTERVAL_MAX_S)
            self._interval_s = min(factor * self._interval_s, interval_max_s)
        self._next_trial_s = self._active_s + self._interval_s

    def _change_to(self, trial: _Trial, ratio: float) -> None:
        old, self.index, self._trial = self.index, trial.index, None
        self._excess = {old: 1 / ratio - 1}
        self._costs = deque(trial.costs, maxlen=_N_COSTS)
        self._usual = median(trial.costs)
        self._expect_change([index for index in self._neighbours(-1 if self.index < old else 1) if index != old])
        self._next_trial_s = self._active_s + self._interval_s

    def _more_threads(self) -> list[int]:
        return [index for index in self._neighbours(1) if index > self.index]

    def _neighbours(self, direction: int) -> list[int]:
        """One and two away, those in ``direction`` first: one may be as good as the current choice and two better."""
        steps = (direction, 2 * direction, -direction, -2 * direction)
        return [self.index + step for step in steps if 0 <= self.index + step < self._n_counts]
