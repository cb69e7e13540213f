"""Sets of characters as ranges of code points."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain

__all__ = ["ANY_CHARACTER", "MAX_CODE_POINT", "Characters"]

MAX_CODE_POINT = 0x10FFFF


@dataclass(frozen=True, slots=True)
class Characters:
    """``ranges`` are inclusive, ascending, and neither overlap nor touch. Made by ``of``."""

    ranges: tuple[tuple[int, int], ...]

    @staticmethod
    def of(ranges: Iterable[tuple[int, int]]) -> Characters:
        """Ranges in any order, overlapping or not."""
        merged: list[tuple[int, int]] = []
        for low, high in sorted(ranges):
            if merged and low <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
            else:
                merged.append((low, high))
        return Characters(tuple(merged))

    @staticmethod
    def of_text(text: str) -> Characters:
        return Characters.of((ord(character), ord(character)) for character in text)

    def __contains__(self, code_point: int) -> bool:
        at = bisect_right(self.ranges, (code_point, MAX_CODE_POINT + 1)) - 1
        return at >= 0 and code_point <= self.ranges[at][1]

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def meets(self, low: int, high: int) -> bool:
        """Whether any character of an inclusive range, which may be empty, is in the set."""
        at = bisect_right(self.ranges, (high, MAX_CODE_POINT + 1)) - 1
        return at >= 0 and low <= min(high, self.ranges[at][1])

    def complement(self) -> Characters:
        bounds = [-1, *chain.from_iterable(self.ranges), MAX_CODE_POINT + 1]
        gaps = ((low + 1, high - 1) for low, high in zip(bounds[::2], bounds[1::2], strict=True))
        return Characters(tuple((low, high) for low, high in gaps if low <= high))

    def __or__(self, other: Characters) -> Characters:
        return Characters.of((*self.ranges, *other.ranges))

    def __and__(self, other: Characters) -> Characters:
        return (self.complement() | other.complement()).complement()


ANY_CHARACTER = Characters(((0, MAX_CODE_POINT),))
