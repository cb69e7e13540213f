"""Follows one run's tokens through its grammar, which may have to be triggered first."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from wasi_nn_backend.errors import InvalidArgument
from wasi_nn_backend.grammar.matcher import Matcher, Place
from wasi_nn_backend.grammar.triggers import SearchState, TriggerSearch, trigger_word

__all__ = ["GrammarFollower", "Step", "TokenText"]


class TokenText(NamedTuple):
    """A token, what it adds to the output, and its own text, which control tokens have without showing it."""

    token: int
    shown: bytes
    own: bytes
    is_end: bool


@dataclass(frozen=True, slots=True)
class Step:
    """What one token does: the place after it, or None and how far the search for a trigger is."""

    place: Place | None
    search: SearchState
    undecoded: bytes
    waited: tuple[int, bytes]


class GrammarFollower:
    """``after`` says what a token would do, ``take`` makes it so. Not thread-safe."""

    def __init__(
        self,
        text: str,
        root: str = "root",
        triggers: Sequence[str] = (),
        token_of: Callable[[str], int | None] | None = None,
    ) -> None:
        """Raises ``InvalidArgument`` for a wrong grammar or trigger, and for words that no text of it begins with."""
        self.matcher = Matcher(text, root, token_of)
        self._triggers = TriggerSearch(triggers)
        self._is_lazy = bool(triggers)
        for word in filter(None, map(trigger_word, triggers)):
            fits = self.matcher.names_tokens or self.matcher.after_text(self.matcher.start, word.encode())
            if not fits:
                raise InvalidArgument(
                    f"the grammar trigger {word!r} is not how the grammar's texts begin: the text from the trigger on "
                    f"is held to the grammar, so let its root begin with the trigger"
                )
        self.reset()

    def reset(self) -> None:
        self.place = None if self._is_lazy else self.matcher.start
        self._search = self._triggers.start
        self._undecoded = b""
        self._waited: list[tuple[int, bytes]] = []

    def after(self, token: TokenText) -> Step | None:
        """None where the token does not fit. Raises ``RuntimeFailure`` when there are too many readings."""
        if self.place is None:
            return self._after_waiting(token)
        if token.is_end:
            place = self.place if self.place.can_end else None
        else:
            place = self.matcher.after(self.place, token.token, token.shown)
        return self._step(token, place) if place else None

    def take(self, step: Step) -> None:
        if step.place is None:
            self._waited.append(step.waited)
        else:
            self._waited.clear()
        self.place, self._search, self._undecoded = step.place, step.search, step.undecoded

    def _step(self, token: TokenText, place: Place | None) -> Step:
        return Step(place, self._search, self._undecoded, (token.token, token.own))

    def _after_waiting(self, token: TokenText) -> Step | None:
        """Anything goes, but a token that triggers the grammar must not go on with what the grammar forbids."""
        if token.is_end:
            return self._step(token, None)
        undecoded = self._undecoded + token.own
        text, n_bytes = codecs.utf_8_decode(undecoded, "surrogateescape", False)
        search, found = self._triggers.feed(self._search, text)
        if found is None:
            return Step(None, search, undecoded[n_bytes:], (token.token, token.own))
        waited = [*self._waited, (token.token, token.own)]
        whole = b"".join(own for _, own in waited)
        start = len(whole.decode("utf-8", "surrogateescape")[:found].encode("utf-8", "surrogateescape"))
        place = self._replayed(*_tokens_from(waited, start))
        return self._step(token, place) if place else None

    def _replayed(self, tokens: Sequence[tuple[int, bytes]], n_before: int) -> Place:
        """Where these tokens lead, of which the first begins with bytes that are none of the grammar's."""
        place = self.matcher.start
        for at, (token, own) in enumerate(tokens):
            if at == 0 and n_before:
                place = self.matcher.after_text(place, own[n_before:])
            else:
                place = self.matcher.after(place, token, own)
            if not place:
                break
        return place


def _tokens_from(waited: Sequence[tuple[int, bytes]], start: int) -> tuple[Sequence[tuple[int, bytes]], int]:
    """The tokens that reach over byte ``start``, and how many bytes of the first lie before it."""
    end = sum(len(own) for _, own in waited)
    for at in range(len(waited) - 1, -1, -1):
        end -= len(waited[at][1])
        if end <= start:
            return waited[at:], start - end
    return waited, start
