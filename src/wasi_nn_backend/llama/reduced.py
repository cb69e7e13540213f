"""llama.cpp's sampler chain, given only the tokens that it can choose from.

Most of what the chain costs is spent on tokens that its top-k throws away a moment later: they are copied into an
array of structs, looked up in the penalties' hash table and compared. Here numpy finds the few that matter, and the
chain gets an array of those. Arithmetic, random numbers and the order of the stages stay llama.cpp's own.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from wasi_nn_backend.errors import RuntimeFailure
from wasi_nn_backend.llama.bindings import native
from wasi_nn_backend.llama.candidates import Candidates, search
from wasi_nn_backend.llama.chain import build_chain, check_largest_logit, check_token, native_context
from wasi_nn_backend.llama.context import NativeContext
from wasi_nn_backend.llama.interface import Context, Greedy, LogitBias, Penalties, SamplerStage, TopK
from wasi_nn_backend.llama.owner import Owner, Resource

__all__ = ["ReducedSampler"]

_Logits = npt.NDArray[np.float32]
_Tokens = npt.NDArray[np.intp]

#: ``llama_token_data``.
_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])

#: A larger top-k leaves so much to llama.cpp that finding it beforehand is no gain.
_MAX_TOP_K = 256
#: llama.cpp compares every candidate with every biased token.
_MAX_BIASES = 256


class ReducedSampler(Owner):
    """A ``llama_sampler`` chain that sees a superset of its top-k. Chooses the same tokens as the whole chain does.

    The one thing that could differ is the order of equal logits, which llama.cpp's partial sort leaves to the places
    that they happen to have. So where two of the top-k are equal, or the last of them and the next, the chain gets the
    whole vocabulary. With real models that is a few tokens in ten thousand.

    Not thread-safe; different samplers may sample one step's rows in parallel.
    """

    def __init__(self, model: Resource, n_vocab: int, stages: Sequence[SamplerStage]) -> None:
        changing = [stage for stage in stages if isinstance(stage, LogitBias | Penalties)]
        choosing = stages[len(changing) :]
        # Two chains in a chain, so that they have one owner, and ``accept`` and ``reset`` reach all links.
        chain = build_chain([], n_vocab)
        super().__init__(Resource("a sampler", chain, native.llama_sampler_free, parent=model))
        self._changing, self._choosing = build_chain(changing, n_vocab), build_chain(choosing, n_vocab)
        native.llama_sampler_chain_add(chain, self._changing)
        native.llama_sampler_chain_add(chain, self._choosing)
        self._n_vocab = n_vocab
        self._changes_logits = bool(changing)
        self._changed = _ChangedTokens(changing)
        # llama.cpp's greedy takes the first of equals: there the candidates have to ascend, and ties do not matter.
        self._greedy = isinstance(choosing[0], Greedy)
        self._n_top = choosing[0].k if isinstance(choosing[0], TopK) else 1
        # Penalised tokens are often among the most probable, and then they do not count.
        self._n_sought = min(self._n_top + (self._n_top // 2 + 8 if changing else 0), n_vocab)
        self._array = _TokenArray(4 * self._n_top + 64)

    @staticmethod
    def suits(stages: Sequence[SamplerStage], n_vocab: int) -> bool:
        """Whether the chain is [LogitBias], [Penalties], TopK, ..., or the same with Greedy for all that follows.

        The top-k must be small. A token with two biases is left to the whole chain: among a part of the vocabulary
        llama.cpp applies only the first of them.
        """
        kinds = [type(stage) for stage in stages]
        n_changing = next((n for n, kind in enumerate(kinds) if kind not in (LogitBias, Penalties)), len(kinds))
        if kinds[:n_changing] not in ([], [LogitBias], [Penalties], [LogitBias, Penalties]):
            return False
        if LogitBias in kinds[n_changing:] or Penalties in kinds[n_changing:]:
            return False
        tokens = [token for stage in stages if isinstance(stage, LogitBias) for token, _ in stage.biases]
        if len(tokens) > _MAX_BIASES or len(tokens) != len(set(tokens)):
            return False
        match stages[n_changing]:
            case Greedy():
                return True
            case TopK(k):
                return 0 < k <= min(_MAX_TOP_K, n_vocab // 4)
            case _:
                return False

    def sample(self, context: Context, row: int) -> int:
        """Raises ``RuntimeFailure`` when the logits, or what penalties and biases make of them, are not numbers."""
        context = native_context(context)
        with self._native() as chain, context.pointer():
            token = self._choose(context, row)
            native.llama_sampler_accept(chain, token)
            self._changed.record(token)
            return token

    def accept(self, token: int) -> None:
        """Raises ``InvalidArgument`` for a token outside of the vocabulary."""
        check_token(token, self._n_vocab)
        with self._native() as chain:
            native.llama_sampler_accept(chain, token)
            self._changed.record(token)

    def reset(self) -> None:
        with self._native() as chain:
            native.llama_sampler_reset(chain)
            self._changed.clear()

    def _choose(self, context: NativeContext, row: int) -> int:
        found = context.candidates(row, self._n_sought)
        check_largest_logit(found.largest)
        if not self._changes_logits:
            if found.distinct:
                self._array.fill(found.tokens, found.logits)
                return self._array.chosen_by(self._choosing)
        elif self._fill_changed(found, context.logits(row)):
            logits = self._change(self._array)
            if self._greedy or _top_is_strict(logits, self._n_top):
                return self._array.chosen_by(self._choosing)
        everything = _TokenArray(self._n_vocab)  # not kept: 12 bytes a token are megabytes
        everything.fill(np.arange(self._n_vocab), context.logits(row))
        self._change(everything)
        return everything.chosen_by(self._choosing)

    def _fill_changed(self, found: Candidates, logits: _Logits) -> bool:
        """Put all tokens into the array that may be in the top-k after biases and penalties. False: they are too many.

        Whatever the changed logits become, ``n_top`` unchanged ones are larger than any that is left out.
        """
        changed = self._changed.tokens()
        tokens = _union(found.tokens, changed)
        if len(tokens) - len(changed) < self._n_top:
            (found,) = search(logits[np.newaxis], min(self._n_top + len(changed), self._n_vocab))
            tokens = _union(found.tokens, changed)
        if len(tokens) > self._n_vocab // 2:
            return False
        self._array.fill(tokens, logits[tokens])
        return True

    def _change(self, array: _TokenArray) -> _Logits:
        """Apply biases and penalties; returns the logits."""
        if self._changes_logits:
            array.apply(self._changing)
        logits = array.logits
        check_largest_logit(float(logits.max()))
        return logits


class _ChangedTokens:
    """The tokens whose logits biases and penalties change: those with a bias and those in the penalties' window."""

    def __init__(self, stages: Sequence[LogitBias | Penalties]) -> None:
        self._biased = [token for stage in stages if isinstance(stage, LogitBias) for token, _ in stage.biases]
        self._n_window = max((stage.last_n for stage in stages if isinstance(stage, Penalties)), default=0)
        self._window: deque[int] = deque()
        self._counts: dict[int, int] = {}  # how often each of these is in the list of biases or the window
        self.clear()

    def record(self, token: int) -> None:
        """Move the window on, as ``llama_sampler_penalties_accept`` does."""
        if not self._n_window:
            return
        self._window.append(token)
        self._counts[token] = self._counts.get(token, 0) + 1
        if len(self._window) > self._n_window:
            oldest = self._window.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]

    def clear(self) -> None:
        self._window.clear()
        self._counts = dict.fromkeys(self._biased, 1)

    def tokens(self) -> _Tokens:
        """Each once, in no order."""
        return np.fromiter(self._counts, dtype=np.intp, count=len(self._counts))


class _TokenArray:
    """A ``llama_token_data_array`` in memory that is reused, and grows when it has to."""

    def __init__(self, n_tokens: int) -> None:
        self._native: Any = native.llama_token_data_array()
        self._reference = ctypes.byref(self._native)
        self._n = 0
        self._reserve(n_tokens)

    def fill(self, tokens: _Tokens, logits: _Logits) -> None:
        self._n = len(tokens)
        if self._n > len(self._data):
            self._reserve(2 * self._n)
        self._ids[: self._n] = tokens
        self._logits[: self._n] = logits
        self._p[: self._n] = 0.0
        self._native.size = self._n
        self._native.selected = -1
        self._native.sorted = False

    def _reserve(self, n_tokens: int) -> None:
        self._data = np.zeros(n_tokens, dtype=_TOKEN_DATA)
        self._ids, self._logits, self._p = self._data["id"], self._data["logit"], self._data["p"]
        self._native.data = ctypes.cast(self._data.ctypes.data, type(self._native.data))

    @property
    def logits(self) -> _Logits:
        """A view, in the order of the tokens until a link of the chain sorts them."""
        return self._logits[: self._n]

    def apply(self, sampler: Any) -> None:
        native.llama_sampler_apply(sampler, self._reference)

    def chosen_by(self, sampler: Any) -> int:
        self.apply(sampler)
        selected = self._native.selected
        if not 0 <= selected < self._native.size:
            raise RuntimeFailure("llama.cpp's sampler chain chose no token; report the sampling settings as a bug")
        return int(self._ids[selected])


def _top_is_strict(logits: _Logits, n_top: int) -> bool:
    """Whether the ``n_top`` largest all differ from each other and from the next: then they have one order only."""
    top = np.sort(logits)[-(n_top + 1) :]
    return not bool((top[1:] == top[:-1]).any())


def _union(tokens: _Tokens, others: _Tokens) -> _Tokens:
    """Ascending. ``np.union1d`` does the same in three times the time."""
    merged = np.concatenate((tokens, others))
    merged.sort()
    keep = np.empty(len(merged), dtype=np.bool_)
    keep[:1] = True
    np.not_equal(merged[1:], merged[:-1], out=keep[1:])
    return merged[keep]
