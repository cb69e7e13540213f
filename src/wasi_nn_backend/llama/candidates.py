"""The few tokens that can be among the most probable ones, found for all rows of a step at once.

Pure numpy. A partial sort of the vocabulary (``np.argpartition``) takes 30 times as long a row as this. The work is
shared by the rows because at 50,000 tokens a row's numbers cost less than calling numpy for them.
"""

from __future__ import annotations

import math
import threading
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["CandidateFinder", "Candidates", "search"]

_Logits = npt.NDArray[np.float32]
_Tokens = npt.NDArray[np.intp]


class Candidates(NamedTuple):
    """Every token of one row whose logit reaches a bound that at least as many reach as were asked for.

    ``words`` are llama.cpp's ``llama_token_data``, shape [n, 3]: the token, the bits of its logit, and zero, in no
    order. With ``distinct`` all of these logits differ; without, some may be equal. ``largest`` is the row's largest
    logit, NaN where the row has one; then the rest means nothing.
    """

    words: npt.NDArray[np.int32]
    distinct: bool
    largest: float

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """Shape [n]."""
        return self.words[:, 0]

    @property
    def logits(self) -> _Logits:
        """Parallel to ``tokens``."""
        return self.words.view(np.float32)[:, 1]


class CandidateFinder:
    """Candidates of the rows of one matrix of logits, shape [n_rows, n_vocab], after the other. Thread-safe.

    A row is laid out as a table, token ``t`` in column ``t % n_columns``, and the columns' maxima as a smaller table,
    whose columns are the groups. The ``n_top``-th largest of the groups' maxima is a lower bound of the ``n_top``-th
    largest logit, as every group stands for another token. Only the columns that reach it are looked at again. With
    three groups for each of the ``n_top`` a row has some 1.2 times as many candidates as were asked for.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._logits: _Logits = np.empty((0, 0), dtype=np.float32)
        self._best: list[int] | None = None
        self._found: list[Candidates] = []
        self._n_found = 0  # the n_top that was searched with
        self._n_asked = 0  # the largest that was asked for in this step
        self._n_expected = 0  # and in the last one: samplers with a large top-k after others must not double the work

    def start(self, logits: _Logits) -> None:
        """Go over to the logits of another step, which must stay as they are until the next start."""
        with self._lock:
            self._logits = logits
            self._best = None
            self._found = []
            self._n_found = 0
            self._n_expected, self._n_asked = self._n_asked, 0

    def best(self, index: int) -> int:
        """The token with the largest logit of row ``index``, the lowest id among equals, that of a NaN where there is
        one. The first call looks through all rows."""
        with self._lock:
            if self._best is None:
                self._best = self._logits.argmax(axis=1).tolist()
            return self._best[index]

    def find(self, index: int, n_top: int) -> Candidates:
        """The candidates of row ``index``, at least ``n_top``. The first call searches all rows.

        ``n_top`` is 1 to n_vocab. Raises ``IndexError`` where there is no such row.
        """
        with self._lock:
            self._n_asked = max(self._n_asked, n_top)
            if n_top > self._n_found:
                self._n_found = max(n_top, self._n_expected)
                self._found = search(self._logits, self._n_found)
            return self._found[index]

    def found(self, index: int, n_top: int) -> Candidates | None:
        """The same, where nothing is left to search. Does not look at the logits."""
        with self._lock:
            self._n_asked = max(self._n_asked, n_top)
            return self._found[index] if n_top <= self._n_found else None


def search(logits: _Logits, n_top: int) -> list[Candidates]:
    """The candidates of each row of ``logits``, shape [n_rows, n_vocab]; see ``CandidateFinder``."""
    n_rows, n_vocab = logits.shape
    n_groups = min(max(64, 1 << (3 * n_top).bit_length()), n_vocab)
    # Few columns are long to look through, many are long to compare, and their maxima leave the nearest cache. A power
    # of two divides most large vocabularies.
    n_columns = max(n_groups, 1 << math.isqrt(4 * n_top * n_vocab).bit_length())
    if n_columns > n_vocab:
        n_columns = n_groups
    maxima = _maxima(logits, n_columns)
    groups = _maxima(maxima, n_groups)
    largest = groups.max(axis=1).tolist()
    groups.partition(n_groups - n_top, axis=1)
    bounds = groups[:, n_groups - n_top, np.newaxis]
    # Flat, as np.nonzero is five times slower in two dimensions.
    reached = (maxima >= bounds).ravel().nonzero()[0]
    rows = reached // n_columns
    positions = (reached + rows * (n_vocab - n_columns))[:, np.newaxis] + np.arange(0, n_vocab, n_columns)
    values = logits.ravel().take(positions, mode="clip")
    reaches = values >= bounds[rows]
    if n_vocab % n_columns:
        reaches &= positions < ((rows + 1) * n_vocab)[:, np.newaxis]  # the table's last line is not full
    hits = reaches.ravel().nonzero()[0]
    tokens, values = positions.ravel()[hits], values.ravel()[hits]
    rows = tokens // n_vocab
    words = np.zeros((len(hits), 3), dtype=np.int32)
    words[:, 0] = tokens - rows * n_vocab  # np.divmod does not use the processor's vectors
    words[:, 1] = values.view(np.int32)
    ends = rows.searchsorted(np.arange(n_rows), side="right").tolist()
    # Nearly always the values of all rows differ, and then each row's do.
    values.sort()
    all_differ = not (values[1:] == values[:-1]).any()
    return [
        Candidates(words[first:end], all_differ or _are_distinct(words[first:end]), largest[row])
        for row, (first, end) in enumerate(pairwise([0, *ends]))
    ]


def _are_distinct(words: npt.NDArray[np.int32]) -> bool:
    """Whether the logits of one row's candidates all differ."""
    logits = words.view(np.float32)[:, 1].tolist()
    return len(set(logits)) == len(logits)


def _maxima(table: _Logits, n_columns: int) -> _Logits:
    """The largest of each residue class of positions modulo ``n_columns``: [n_rows, n] to [n_rows, n_columns]."""
    n_rows, n = table.shape
    n_full = n - n % n_columns
    maxima: _Logits = table[:, :n_full].reshape(n_rows, -1, n_columns).max(axis=1)
    if n_full < n:
        np.maximum(maxima[:, : n - n_full], table[:, n_full:], out=maxima[:, : n - n_full])
    return maxima
