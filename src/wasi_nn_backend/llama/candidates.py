"""The few tokens that can be among a vocabulary's most probable ones, found in one pass over the logits.

Pure numpy. A partial sort of the whole vocabulary (``np.argpartition``) takes 20 times as long as this, and its result
says nothing about ties.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

__all__ = ["CandidateFilter"]

_Logits = npt.NDArray[np.float32]
_Tokens = npt.NDArray[np.intp]

_MIN_COLUMNS = 64


class CandidateFilter:
    """Finds a small superset of the ``n_top`` largest logits when some of them are going to be changed.

    The logits are laid out as a table, token ``t`` in column ``t % n_columns``. The ``n_top``-th largest of the
    columns' maxima is a lower bound of the ``n_top``-th largest logit, as every column stands for one token at least.
    Only the columns that reach it are looked at again. Columns in which a logit is going to be changed do not count
    for the bound, and the changed tokens are candidates whatever becomes of them.
    """

    def __init__(self, n_vocab: int, n_top: int, n_changed_max: int) -> None:
        # Few columns are long to look through, many are long to rank: both cost the same at the square root. Each
        # changed token may take a column out, so there should be more columns than those.
        n_columns = max(math.isqrt(n_top * n_vocab), min(n_changed_max, n_vocab // 16), _MIN_COLUMNS)
        n_columns += -n_columns % _MIN_COLUMNS
        self._n_columns = min(n_columns, n_vocab)
        self._n_rows = n_vocab // self._n_columns
        self._n_top = n_top

    def maxima(self, logits: _Logits) -> _Logits:
        """The largest logit of each column, NaN where there is one. ``logits`` has the shape [n_vocab]."""
        maxima: _Logits = self._table(logits).max(axis=0)
        tail = logits[self._n_rows * self._n_columns :]
        np.maximum(maxima[: len(tail)], tail, out=maxima[: len(tail)])
        return maxima

    def candidates(self, logits: _Logits, maxima: _Logits, changed: _Tokens) -> _Tokens | None:
        """Ascending token ids: all of ``changed``, and every other token that may be among the ``n_top`` largest.

        Whatever the ``changed`` logits become, a token that is left out is strictly smaller than ``n_top`` others.
        None when no bound was found: too few columns without a changed token, or too few logits above -inf.
        """
        ranked = maxima
        if len(changed):
            ranked = maxima.copy()
            ranked[changed % self._n_columns] = -np.inf
        if len(ranked) < self._n_top:
            return None
        bound = np.partition(ranked, len(ranked) - self._n_top)[len(ranked) - self._n_top]
        if bound == -np.inf:
            return None
        columns = np.flatnonzero(maxima >= bound)
        rows, indices = np.nonzero(self._table(logits).take(columns, axis=1) >= bound)
        found = rows * self._n_columns + columns[indices]
        first_of_tail = self._n_rows * self._n_columns
        if first_of_tail < len(logits):
            found = np.concatenate((found, first_of_tail + np.flatnonzero(logits[first_of_tail:] >= bound)))
        return _merge(found, changed) if len(changed) else found

    def _table(self, logits: _Logits) -> _Logits:
        return logits[: self._n_rows * self._n_columns].reshape(self._n_rows, self._n_columns)


def _merge(found: _Tokens, changed: _Tokens) -> _Tokens:
    """The union, ascending. ``np.union1d`` does the same in three times the time."""
    merged = np.concatenate((found, changed))
    merged.sort()
    keep = np.empty(len(merged), dtype=np.bool_)
    keep[0] = True
    np.not_equal(merged[1:], merged[:-1], out=keep[1:])
    return merged[keep]
