"""A vocabulary's texts as a tree of characters, which a grammar goes through level by level."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["TextLevel", "TokenTable"]

Numbers = npt.NDArray[np.int32]


class TextLevel(NamedTuple):
    """All beginnings of texts of one length: ``parents`` are places in the level before, ``characters`` places in
    ``TokenTable.code_points``, and at ``end_places`` end the texts of ``end_tokens``."""

    parents: Numbers
    characters: Numbers
    end_places: Numbers
    end_tokens: Numbers


class TokenTable:
    """``texts`` is what each token adds to the output; those that add nothing are left out, and those with NUL.

    ``every`` are all tokens. ``levels`` has the texts that are whole characters, ``partial`` the rest, as (token,
    text). ``code_points`` are the characters that come up in ``levels``, ascending.
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
        spelled = "".join(text for text, _ in whole).encode("utf-32-le")
        self.code_points, characters = np.unique(np.frombuffer(spelled, dtype=np.uint32), return_inverse=True)
        lengths = np.array([len(text) for text, _ in whole], dtype=np.int64)
        tokens = np.array([token for _, token in whole], dtype=np.int32)
        self.levels = _levels(characters.astype(np.int32), lengths, tokens)


def _levels(characters: Numbers, lengths: npt.NDArray[np.int64], tokens: Numbers) -> list[TextLevel]:
    """From sorted texts, written one behind the other: a text that begins as the one before it shares its places."""
    starts = np.cumsum(lengths) - lengths
    levels: list[TextLevel] = []
    places = np.zeros(len(tokens), dtype=np.int32)  # of each text's beginning, in the level before
    remaining = np.arange(len(tokens))
    while len(remaining):
        spelled = characters[starts[remaining] + len(levels)]
        before = places[remaining]
        is_new = np.ones(len(remaining), dtype=np.bool_)
        is_new[1:] = (before[1:] != before[:-1]) | (spelled[1:] != spelled[:-1])
        places[remaining] = np.cumsum(is_new) - 1
        ends = remaining[lengths[remaining] == len(levels) + 1]
        levels.append(TextLevel(before[is_new], spelled[is_new], places[ends], tokens[ends]))
        remaining = remaining[lengths[remaining] > len(levels)]
    return levels
