"""Follows a text through a grammar: which stacks of open rules are possible after each character.

States that were found are kept, so that a text which goes on as others did costs a dictionary look-up a character.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from wasi_nn_backend.errors import RuntimeFailure
from wasi_nn_backend.grammar.characters import Characters
from wasi_nn_backend.grammar.gbnf import Element, Grammar, TokenElement

__all__ = ["Machine", "State"]

#: At one place of a text. Grammars of a few thousand words have as many.
_N_STACKS_MAX: Final = 5000
#: Between two characters, with the rules that open and close without any.
_N_STACKS_TRIED_MAX: Final = 50_000
_N_STATES_KEPT_MAX: Final = 4096
_N_STACKS_KEPT_MAX: Final = 65_536

_END: Final = -1


@dataclass(slots=True, eq=False)
class _Stack:
    """What has to come, from the top down: an element, then what is under it. Equal stacks are one object.

    ``after`` are the stacks that there are when a character or token on top was found, as far as that was asked for.
    """

    element: int
    below: _Stack | None
    after: tuple[_Stack | None, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """The possible stacks after some text, each with a character or a token on top; None is the empty one."""

    stacks: tuple[_Stack | None, ...]
    after: dict[str, State] = field(default_factory=dict)  # by character, as far as it was asked for

    def __bool__(self) -> bool:
        """False where the text does not fit."""
        return bool(self.stacks)

    @property
    def can_end(self) -> bool:
        return None in self.stacks


class Machine:
    """Not thread-safe. Raises ``RuntimeFailure`` when a text has too many readings, or takes too much work."""

    def __init__(self, grammar: Grammar) -> None:
        self._elements: list[Element] = []
        self._next: list[int] = []
        self._starts: list[list[int]] = []  # of each rule's alternatives
        for rule in grammar.rules:
            self._starts.append([self._add(alternative) for alternative in rule.alternatives])
        self._stacks: dict[tuple[int, _Stack | None], _Stack] = {}
        self._states: dict[frozenset[_Stack | None], State] = {}
        self._n_tries_left = _N_STACKS_TRIED_MAX
        self.nowhere = self._state(())
        self.start = self.start_of(grammar.root)

    def _add(self, alternative: list[Element]) -> int:
        start = len(self._elements)
        self._elements.extend(alternative)
        self._next.extend(range(start + 1, len(self._elements)))
        if not alternative:
            return _END
        self._next.append(_END)
        return start

    def start_of(self, rule: int) -> State:
        """The state in which a text of one rule, and nothing after it, is expected."""
        return self._state(self._opened(self._push(start, None) for start in self._starts[rule]))

    def prepare(self, state: State, n_tries: int) -> None:
        """To be called before each piece of work that begins at ``state``: sets its limit, in stacks looked at.

        A million takes about a second.
        """
        self._n_tries_left = n_tries
        if len(self._states) < _N_STATES_KEPT_MAX and len(self._stacks) < _N_STACKS_KEPT_MAX:
            return
        self._states.clear()
        self._stacks.clear()
        for kept in (state, self.start, self.nowhere):  # their stacks stay the same objects
            kept.after.clear()
            self._states[frozenset(kept.stacks)] = kept
            for top in kept.stacks:
                stack = top
                while stack is not None and (stack.element, stack.below) not in self._stacks:
                    stack.after = None
                    self._stacks[stack.element, stack.below] = stack
                    stack = stack.below

    def after(self, state: State, character: str) -> State:
        """``nowhere`` where the character does not fit."""
        known = state.after.get(character)
        if known is None:
            code_point = ord(character)
            known = state.after[character] = self._state_after(
                stack
                for stack, element in self._tops(state)
                if isinstance(element, Characters) and code_point in element
            )
        return known

    def after_token(self, state: State, token: int) -> State:
        """The same for an element that is a token."""
        return self._state_after(
            stack
            for stack, element in self._tops(state)
            if isinstance(element, TokenElement) and (element.token == token) != element.is_negated
        )

    def joined(self, state: State, other: State) -> State:
        return self._state(tuple(dict.fromkeys((*state.stacks, *other.stacks))))

    def expected(self, state: State) -> Iterator[Element]:
        """What can come next, one element for each stack."""
        return (element for _, element in self._tops(state))

    def _tops(self, state: State) -> Iterator[tuple[_Stack, Element]]:
        return ((stack, self._elements[stack.element]) for stack in state.stacks if stack is not None)

    def _state_after(self, passed: Iterable[_Stack]) -> State:
        stacks: dict[_Stack | None, None] = {}
        for stack in passed:
            if stack.after is None:
                stack.after = self._opened((self._push(self._next[stack.element], stack.below),))
            stacks.update(dict.fromkeys(stack.after))
            self._spend(len(stack.after))
        if len(stacks) > _N_STACKS_MAX:
            raise _too_many()
        return self._state(tuple(stacks))

    def _push(self, element: int, below: _Stack | None) -> _Stack | None:
        if element == _END:
            return below
        key = (element, below)
        stack = self._stacks.get(key)
        if stack is None:
            stack = self._stacks[key] = _Stack(element, below)
        return stack

    def _opened(self, stacks: Iterable[_Stack | None]) -> tuple[_Stack | None, ...]:
        """The same stacks with the rules on top replaced by what they begin with, until none is left."""
        open_stacks = list(stacks)
        seen: dict[_Stack | None, None] = {}
        opened: dict[_Stack | None, None] = {}
        while open_stacks:
            stack = open_stacks.pop()
            if stack in seen:
                continue
            seen[stack] = None
            rule = None if stack is None else self._elements[stack.element]
            if stack is None or not isinstance(rule, int):
                opened[stack] = None
            else:
                below = self._push(self._next[stack.element], stack.below)
                open_stacks.extend(self._push(start, below) for start in self._starts[rule])
            if len(opened) > _N_STACKS_MAX or len(seen) > _N_STACKS_TRIED_MAX:
                raise _too_many()
        self._spend(len(seen))
        return tuple(opened)

    def _spend(self, n_tries: int) -> None:
        self._n_tries_left -= n_tries
        if self._n_tries_left < 0:
            raise _too_many()

    def _state(self, stacks: tuple[_Stack | None, ...]) -> State:
        key = frozenset(stacks)
        state = self._states.get(key)
        if state is None:
            state = self._states[key] = State(stacks)
        return state


def _too_many() -> RuntimeFailure:
    return RuntimeFailure(
        "the grammar has too many readings of the text so far to go on; make its rules less ambiguous"
    )
