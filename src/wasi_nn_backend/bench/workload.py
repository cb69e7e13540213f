"""What every contender of a benchmark is given, and how its speed is counted."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["N_TAIL", "Contender", "Prompt", "PromptMaker", "Span", "tokens_per_s"]

#: Words at a prompt's end that differ from round to round; what comes before them stays a session's own.
N_TAIL = 8
WORDS = (
    *("the", "of", "and", "to", "in", "is", "was", "for", "on", "that", "with", "as", "by", "at", "from", "his"),
    *("her", "are", "be", "or", "an", "which", "were", "their", "has", "have", "had", "not", "one", "all", "time"),
    *("year", "day", "man", "world", "life", "part", "place", "work", "week", "point", "home", "water", "room"),
    *("area", "money", "story", "fact", "month", "night", "house", "book", "word", "city", "name", "team", "line"),
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The same prompt as text and as tokens, a beginning-of-text token included where the model wants one."""

    text: str
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Span:
    """One session's generation: its tokens, the time of the first and of the last (seconds of one clock)."""

    n_tokens: int
    first_s: float
    end_s: float


class Contender(Protocol):
    """Somebody who generates for several sessions; the n-th prompt is always the n-th session's."""

    def generate(self, prompts: Sequence[Prompt], n_tokens: int) -> list[Span]:
        """Compute what is new of the prompts and generate ``n_tokens`` for each session, greedily, past any end."""
        ...


class PromptMaker:
    """Prompts of an exact number of tokens: words that are one token each, drawn anew for every session."""

    def __init__(self, tokenize: Callable[[bytes], list[int]]) -> None:
        self._tokenize = tokenize
        base = tokenize(b" the")
        self._n_extra = len(base) - 1
        self._words = [word for word in WORDS if len(tokenize(f" the {word}".encode())) == len(base) + 1]
        if self._n_extra > 1 or len(self._words) < 20:
            raise SystemExit("this model's tokenizer splits common words: no prompts of an exact length can be made")

    def make(self, session: int, round_: int, n_tokens: int) -> Prompt:
        """Distinct in every session, from the first words on; in every round the last ``N_TAIL`` words are others."""
        n_words = n_tokens - self._n_extra
        head, tail = random.Random(f"session {session}"), random.Random(f"session {session}, round {round_}")
        words = head.choices(self._words, k=n_words - N_TAIL) + tail.choices(self._words, k=N_TAIL)
        text = "".join(f" {word}" for word in words)
        tokens = self._tokenize(text.encode())
        if len(tokens) != n_tokens:
            raise SystemExit(f"a prompt has {len(tokens)} tokens in place of {n_tokens}: this model needs other words")
        return Prompt(text, tokens)


def tokens_per_s(spans: Sequence[Span]) -> float:
    """All sessions together, while all of them generate: from when the last one has its first token until the first
    one ends. Each counts with the share of its own tokens that falls into this time.

    Raises ``ValueError`` where there is no such time, as when they take turns.
    """
    start_s, end_s = max(span.first_s for span in spans), min(span.end_s for span in spans)
    if end_s <= start_s:
        raise ValueError(f"the {len(spans)} sessions never generated at the same time: generate more tokens")
    return sum((span.n_tokens - 1) / (span.end_s - span.first_s) for span in spans)
