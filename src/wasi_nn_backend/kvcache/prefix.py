"""Which cached tokens a prompt can start from."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["common_prefix_length"]

_N_STEP = 64


def common_prefix_length(left: Sequence[int], right: Sequence[int]) -> int:
    """How many leading tokens two sequences share.

    Whole slices are compared first, which loops in C: this runs for each cached session whenever one is admitted.
    """
    n_max = min(len(left), len(right))
    at = 0
    while at < n_max:
        end = min(at + _N_STEP, n_max)
        if left[at:end] != right[at:end]:
            while left[at] == right[at]:
                at += 1
            return at
        at = end
    return n_max
