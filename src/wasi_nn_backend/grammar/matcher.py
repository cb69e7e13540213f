"""A grammar as tokens see it: bytes that may end in the middle of a character."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from wasi_nn_backend.errors import RuntimeFailure
from wasi_nn_backend.grammar.characters import MAX_CODE_POINT, Characters
from wasi_nn_backend.grammar.checks import check_rules, nesting_rules
from wasi_nn_backend.grammar.gbnf import Grammar, TokenElement, complain, read_gbnf
from wasi_nn_backend.grammar.machine import Machine, State
from wasi_nn_backend.grammar.token_table import TokenTable

__all__ = ["Matcher", "Place", "check_gbnf"]

#: Limits of the work for one token, and for the whole vocabulary; see ``Machine.prepare``.
_N_TRIES_TOKEN: Final = 200_000
_N_TRIES_VOCABULARY: Final = 2_000_000

_N_CHARACTERS_TRIED: Final = 64
_N_STEPS_TRIED_MAX: Final = 40_000

_LEAST_OF_LENGTH: Final = {2: 0x80, 3: 0x800, 4: 0x10000}


class Place(NamedTuple):
    """Where a text is in its grammar, and the bytes after that which are no whole character yet."""

    state: State
    pending: bytes = b""

    def __bool__(self) -> bool:
        """False where the text does not fit."""
        return bool(self.state)

    @property
    def can_end(self) -> bool:
        return self.state.can_end and not self.pending


class Matcher:
    """One grammar, checked, for one run. Not thread-safe.

    ``token_of`` is asked for tokens that the grammar names by their text. With None they are not looked up, and no
    token fits there.
    """

    def __init__(self, text: str, root: str = "root", token_of: Callable[[str], int | None] | None = None) -> None:
        """Raises ``InvalidArgument`` for a grammar that is wrong, too large, or has too many readings."""
        grammar = read_gbnf(text, root)
        check_rules(grammar)
        self.names_tokens = _look_up_tokens(grammar, token_of)
        self._machine = _machine(grammar)
        _check_readings(grammar, self._machine)
        self._nowhere = Place(self._machine.nowhere)
        self.start = Place(self._machine.start)

    def after(self, place: Place, token: int, text: bytes) -> Place:
        """Where one more token leads. Empty ``text`` is a token that shows nothing: only its number can fit.

        Raises ``RuntimeFailure`` when there are too many readings.
        """
        self._machine.prepare(place.state, _N_TRIES_TOKEN)
        by_text = self._after_text(place, text) if text else self._nowhere
        if not self.names_tokens or place.pending:
            return by_text
        by_token = self._machine.after_token(place.state, token)
        return Place(self._machine.joined(by_token, by_text.state), by_text.pending) if by_token else by_text

    def after_text(self, place: Place, text: bytes) -> Place:
        """Where bytes lead; nowhere for bytes that no UTF-8 text has, and for NUL, which no text of a grammar has."""
        self._machine.prepare(place.state, _N_TRIES_TOKEN)
        return self._after_text(place, text)

    def fitting(self, place: Place, table: TokenTable) -> npt.NDArray[np.int32]:
        """All tokens that fit here, ascending. Raises ``RuntimeFailure`` when that takes too much work.

        Some 5 ms where most of 49,000 tokens fit, less where few do.
        """
        self._machine.prepare(place.state, _N_TRIES_VOCABULARY)
        partial = [token for token, text in table.partial if self._after_text(place, text)]
        fitting = [np.array(partial, dtype=np.int32)]
        if not place.pending:
            fitting += self._whole_fitting(place.state, table)
            fitting.append(np.array(self._named(place.state, table), dtype=np.int32))
        return np.unique(np.concatenate(fitting))

    def _after_text(self, place: Place, text: bytes) -> Place:
        state, text = place.state, place.pending + text
        try:
            characters, n_bytes = codecs.utf_8_decode(text, "strict", False)
        except UnicodeDecodeError:
            return self._nowhere
        for character in characters:
            state = self._machine.after(state, character)
            if not state.stacks or character == "\0":
                return self._nowhere
        pending = text[n_bytes:]
        if pending and not self._expects_one_of(state, *_completions(pending)):
            return self._nowhere
        return Place(state, pending)

    def _whole_fitting(self, state: State, table: TokenTable) -> list[npt.NDArray[np.int32]]:
        """Go through the tree of the texts with the states that each of its places is in."""
        states, numbers = [state], {state: 0}
        places = np.zeros(1, dtype=np.int32)  # the number of the state at each place of a level, -1 where nothing fits
        fitting: list[npt.NDArray[np.int32]] = []
        for level in table.levels:
            before = places[level.parents]
            places = np.full(len(before), -1, dtype=np.int32)
            alive = np.flatnonzero(before >= 0)
            alive = alive[np.argsort(before[alive], kind="stable")]
            for same in np.split(alive, np.flatnonzero(np.diff(before[alive])) + 1) if len(alive) else ():
                follows = self._followers(states[before[same[0]]], table, states, numbers)
                places[same] = follows[level.characters[same]]
            fitting.append(level.end_tokens[places[level.end_places] >= 0])
            if not len(alive):
                break
        return fitting

    def _followers(
        self, state: State, table: TokenTable, states: list[State], numbers: dict[State, int]
    ) -> npt.NDArray[np.int32]:
        """For each character of the table the number of the state after it, new ones added; -1 where it does not fit.

        Characters between two bounds of the sets that are expected all lead to the same state.
        """
        sets = [element for element in self._machine.expected(state) if isinstance(element, Characters)]
        bounds = sorted({bound for characters in sets for low, high in characters.ranges for bound in (low, high + 1)})
        numbers_between = [-1]
        for bound in bounds:
            after = self._machine.after(state, chr(bound)) if bound <= MAX_CODE_POINT else self._machine.nowhere
            if after is self._machine.nowhere:
                numbers_between.append(-1)
            else:
                numbers_between.append(numbers.setdefault(after, len(states)))
                if numbers_between[-1] == len(states):
                    states.append(after)
        between = np.array(numbers_between, dtype=np.int32)
        return between[np.searchsorted(np.array(bounds, dtype=np.uint32), table.code_points, side="right")]

    def _named(self, state: State, table: TokenTable) -> list[int]:
        """The tokens that fit because the grammar names them, or names others."""
        named: set[int] = set()
        for element in self._machine.expected(state):
            if isinstance(element, TokenElement) and element.token is not None:
                named |= table.every - {element.token} if element.is_negated else table.every & {element.token}
        return list(named)

    def _expects_one_of(self, state: State, low: int, high: int) -> bool:
        elements = self._machine.expected(state)
        return any(isinstance(element, Characters) and element.meets(low, high) for element in elements)


def check_gbnf(text: str) -> None:
    """Raises ``InvalidArgument`` for what no model could use as a grammar."""
    Matcher(text)


def _completions(pending: bytes) -> tuple[int, int]:
    """The least and the largest character whose UTF-8 begins with these bytes; the other way round for none."""
    lead = pending[0]
    length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    value = lead & (0x7F >> length)
    for byte in pending[1:]:
        value = value << 6 | byte & 0x3F
    n_bits = 6 * (length - len(pending))
    low, high = value << n_bits, (value + 1 << n_bits) - 1
    if lead == 0xED:
        high = min(high, 0xD7FF)  # surrogates are no characters
    return max(low, _LEAST_OF_LENGTH[length]), min(high, MAX_CODE_POINT)


def _look_up_tokens(grammar: Grammar, token_of: Callable[[str], int | None] | None) -> bool:
    """Put the tokens' numbers in their elements; False without any.

    Raises ``InvalidArgument`` for texts that are no single token.
    """
    names_tokens = False
    for rule in grammar.rules:
        for alternative in rule.alternatives:
            for at, element in enumerate(alternative):
                if isinstance(element, TokenElement):
                    names_tokens = True
                    alternative[at] = _looked_up(element, grammar.text, token_of)
    return names_tokens


def _looked_up(element: TokenElement, text: str, token_of: Callable[[str], int | None] | None) -> TokenElement:
    if element.token is not None or token_of is None:
        return element
    token = token_of(element.text)
    if token is None:
        complain(text, element.position, f"{element.text} is not one token of this model")
    return TokenElement(element.text, token, element.is_negated, element.position)


def _machine(grammar: Grammar) -> Machine:
    try:
        return Machine(grammar)
    except RuntimeFailure:
        complain(grammar.text, grammar.rules[grammar.root].position, "a text can begin in too many ways; simplify it")


def _check_readings(grammar: Grammar, machine: Machine) -> None:
    """Refuse grammars whose readings multiply with each character, as those of S ::= "a" S "b" | "a" S "c" | "d" do.

    Tried from every kind of nesting with the characters that leave the most readings. It cannot find them all: the
    rest ends when its run has too many.
    """
    n_steps = 0
    for rule in nesting_rules(grammar):
        machine.prepare(machine.start, _N_TRIES_VOCABULARY)
        try:
            state = machine.start_of(rule)
            for _ in range(_N_CHARACTERS_TRIED):
                expected = [element for element in machine.expected(state) if isinstance(element, Characters)]
                tries = {chr(low) for element in expected for low, _ in element.ranges}
                n_steps += len(tries) * len(state.stacks)
                if not tries or n_steps > _N_STEPS_TRIED_MAX:
                    break
                state = max((machine.after(state, character) for character in sorted(tries)), key=_n_stacks)
        except RuntimeFailure:
            name, position = grammar.rules[rule].name, grammar.rules[rule].position
            complain(
                grammar.text, position, f"the rule {name!r} has too many readings of one text; make it less ambiguous"
            )


def _n_stacks(state: State) -> int:
    return len(state.stacks)
