"""Finds the place in a growing text from which on a lazy grammar holds.

llama.cpp does this with ``std::regex`` over the whole text after each token: it takes longer and longer, over a minute
for 20,000 characters, and an expression that it cannot read ends the process. Here all expressions advance together,
one character at a time, with work for each that is bounded by their length.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.grammar.characters import Characters
from wasi_nn_backend.grammar.regex import Anchor, Choice, Group, Node, Repeat, read_regex
from wasi_nn_backend.grammar.regex import Sequence as NodeSequence

__all__ = ["SearchState", "TriggerSearch", "check_triggers", "trigger_word"]

_N_STEPS_MAX: Final = 4000


def trigger_word(trigger: str) -> str | None:
    """The word that a trigger is, or None for an expression between slashes."""
    return None if len(trigger) > 2 and trigger[0] == trigger[-1] == "/" else trigger


def check_triggers(triggers: Sequence[str]) -> None:
    """Raises ``InvalidArgument`` for expressions that are wrong or larger than any trigger has to be."""
    TriggerSearch(triggers)


@dataclass(frozen=True, slots=True)
class _Fork:
    """Both ways are tried, the first one first."""

    first: int
    second: int


@dataclass(frozen=True, slots=True)
class _Capture:
    """The first character behind this is where the grammar's text begins."""


#: One step of an expression; None is its end.
_Step = Characters | Anchor | _Fork | _Capture | None


class SearchState(NamedTuple):
    """How far a search is: characters fed, and for each step reached where its match began and its capture (or -1)."""

    n_characters: int
    threads: Mapping[int, tuple[int, int]]


class TriggerSearch:
    """Fed with the text, it answers with the offset in characters where the first match begins.

    An expression with parentheses that capture counts from its first capture. Of matches that end at the same
    character the one that begins first counts. ``$`` is the end of what was fed so far.
    """

    def __init__(self, triggers: Sequence[str]) -> None:
        """Raises ``InvalidArgument`` for expressions that are wrong or larger than any trigger has to be."""
        self._steps: list[_Step] = []
        self._starts = [self._compile(trigger) for trigger in triggers]
        self.start = SearchState(0, {})

    def _compile(self, trigger: str) -> int:
        start = len(self._steps)
        word = trigger_word(trigger)
        if word is None:
            self._emit(read_regex(trigger[1:-1]))
        else:
            self._steps.extend(map(Characters.of_text, word))
        self._steps.append(None)
        if not _needs_characters(self._steps, start):
            raise InvalidArgument(
                f"the grammar trigger {trigger!r} matches an empty text; leave grammar_lazy off instead"
            )
        return start

    def _emit(self, node: Node) -> None:
        if len(self._steps) > _N_STEPS_MAX:
            raise InvalidArgument(f"the grammar triggers are larger than {_N_STEPS_MAX} steps, repetitions written out")
        match node:
            case NodeSequence(items):
                for item in items:
                    self._emit(item)
            case Choice(options):
                self._emit_choice(options)
            case Group(item):
                self._steps.append(_Capture())
                self._emit(item)
            case Repeat(item, at_least, at_most):
                self._emit_repetition(item, at_least, at_most)
            case _:
                self._steps.append(node)

    def _emit_choice(self, options: tuple[Node, ...]) -> None:
        ends = []
        for option in options[:-1]:
            fork = self._hole()
            self._emit(option)
            ends.append(self._hole())
            self._steps[fork] = _Fork(fork + 1, len(self._steps))
        self._emit(options[-1])
        for end in ends:
            self._steps[end] = _Fork(len(self._steps), len(self._steps))

    def _emit_repetition(self, item: Node, at_least: int, at_most: int | None) -> None:
        for _ in range(at_least):
            self._emit(item)
        if at_most is None:
            fork = self._hole()
            self._emit(item)
            self._steps.append(_Fork(fork, fork))
            self._steps[fork] = _Fork(fork + 1, len(self._steps))
            return
        forks = []
        for _ in range(at_most - at_least):
            forks.append(self._hole())
            self._emit(item)
        for fork in forks:
            self._steps[fork] = _Fork(fork + 1, len(self._steps))

    def _hole(self) -> int:
        self._steps.append(None)
        return len(self._steps) - 1

    def feed(self, state: SearchState, text: str) -> tuple[SearchState, int | None]:
        """The state after more text, and the offset of the match in it, from the first character ever fed, if any."""
        for character in text:
            code_point = ord(character)
            threads: dict[int, tuple[int, int]] = {}
            for step, begin in self._opened(state, at_end=False).items():
                expected = self._steps[step]
                if isinstance(expected, Characters) and code_point in expected:
                    threads.setdefault(step + 1, begin)
            state = SearchState(state.n_characters + 1, threads)
            if (found := self._found(self._opened(state, at_end=False))) is not None:
                return state, found
        return state, self._found(self._opened(state, at_end=True)) if text else None

    def _found(self, threads: dict[int, tuple[int, int]]) -> int | None:
        matches = [begins for step, begins in threads.items() if self._steps[step] is None]
        if not matches:
            return None
        begin, capture = min(matches)
        return capture if capture >= 0 else begin

    def _opened(self, state: SearchState, *, at_end: bool) -> dict[int, tuple[int, int]]:
        """Every step that wants a character or is the end, reached from the threads and, afterwards, from the start."""
        here = state.n_characters
        opened: dict[int, tuple[int, int]] = {}
        seen: set[int] = set()
        fresh: Iterable[tuple[int, tuple[int, int]]] = ((start, (here, -1)) for start in self._starts)
        waiting = [*reversed([*sorted(state.threads.items(), key=lambda thread: thread[1][0]), *fresh])]
        while waiting:
            number, (begin, capture) = waiting.pop()
            if number in seen:
                continue
            seen.add(number)
            step = self._steps[number]
            match step:
                case _Fork(first, second):
                    waiting += [(second, (begin, capture)), (first, (begin, capture))]
                case _Capture():
                    waiting.append((number + 1, (begin, capture if capture >= 0 else here)))
                case Anchor(is_end):
                    if at_end if is_end else here == 0:
                        waiting.append((number + 1, (begin, capture)))
                case _:
                    opened[number] = (begin, capture)
        return opened


def _needs_characters(steps: list[_Step], start: int) -> bool:
    """Whether the end cannot be reached from ``start`` without any character."""
    waiting, seen = [start], set()
    while waiting:
        number = waiting.pop()
        if number in seen:
            continue
        seen.add(number)
        match steps[number]:
            case None:
                return False
            case _Fork(first, second):
                waiting += [first, second]
            case Characters():
                continue
            case _:
                waiting.append(number + 1)
    return True
