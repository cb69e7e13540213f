"""A vocabulary's texts in the order in which a grammar can go through them quickly."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

__all__ = ["TokenTable", "n_shared"]


class TokenTable:
    """``texts`` is what each token adds to the output; those that add nothing are left out, and those with NUL.

    ``every`` are all tokens. ``whole`` are the texts that are whole characters, sorted, and parallel to them ``tokens``
    and ``n_shared``: how many characters a text has in common with the one before it. ``partial`` has the rest, as
    (token, text).
    """

    def __init__(self, texts: Iterable[bytes]) -> None:
        whole: list[tuple[str, int]] = []
        self.partial: list[tuple[int, bytes]] = []
        n_tokens = 0
        for token, text in enumerate(texts):
            n_tokens += 1
            if not text or b"\0" in text:
                continue
            try:
                whole.append((text.decode(), token))
            except UnicodeDecodeError:
                self.partial.append((token, text))
        self.every = frozenset(range(n_tokens))
        whole.sort()
        self.whole = [text for text, _ in whole]
        self.tokens = [token for _, token in whole]
        self.n_shared = [0, *(n_shared(one, other) for one, other in pairwise(self.whole))][: len(whole)]


def n_shared(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    n = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        n += 1
    return n
