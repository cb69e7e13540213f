"""llama.cpp's sampler chain, given only the tokens that it can choose from.

Most of what the chain costs is spent on tokens that its top-k throws away a moment later: they are copied into an
array of structs, looked up in the penalties' hash table and compared. Here numpy finds the few that matter, and the
chain gets an array of those. Arithmetic, random numbers and the order of the stages stay llama.cpp's own.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from wasi_nn_backend.llama.bindings import native
from wasi_nn_backend.llama.candidates import Candidates, search
from wasi_nn_backend.llama.chain import check_largest_logit, check_token, native_context
from wasi_nn_backend.llama.context import NativeContext
from wasi_nn_backend.llama.interface import Context
from wasi_nn_backend.llama.links import LinkMaker
from wasi_nn_backend.llama.owner import Owner, Resource
from wasi_nn_backend.llama.stages import Dry, Greedy, LogitBias, Penalties, SamplerStage, TopK
from wasi_nn_backend.llama.token_array import TokenArray, no_token_left

__all__ = ["ReducedSampler"]

_Logits = npt.NDArray[np.float32]
_Tokens = npt.NDArray[np.intp]

#: The stages that change tokens' logits one by one, by what was said before and nothing else: what they do to some of
#: the tokens is what they do to those among all.
_Changing = LogitBias | Penalties | Dry

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

    def __init__(self, links: LinkMaker, stages: Sequence[SamplerStage]) -> None:
        changing = _leading_changes(stages)
        choosing = stages[len(changing) :]
        # Two chains in a chain, so that they have one owner, and ``accept`` and ``reset`` reach all links.
        chain = links.chain([])
        super().__init__(Resource("a sampler", chain, native.llama_sampler_free, parent=links.model))
        self._changing = links.chain(changing)
        native.llama_sampler_chain_add(chain, self._changing)
        self._choosing = links.chain(choosing)
        native.llama_sampler_chain_add(chain, self._choosing)
        self._n_vocab = n_vocab = links.n_vocab
        self._changes_logits = bool(changing)
        self._only_lowers = all(map(_only_lowers, changing))
        # Of the other links none keeps what was said. Mirostat and random numbers move on where they choose.
        self._records = any(isinstance(stage, Penalties | Dry) for stage in stages)
        self._changed = _ChangedTokens(changing)
        # llama.cpp's greedy takes the first of equals: there the candidates have to ascend, and ties do not matter.
        self._greedy = isinstance(choosing[0], Greedy)
        self._n_top = choosing[0].k if isinstance(choosing[0], TopK) else 1
        # Penalised tokens are often among the most probable, and then they do not count.
        self._n_sought = min(self._n_top + (self._n_top // 2 + 8 if changing else 0), n_vocab)
        self._array = TokenArray(4 * self._n_top + 64)

    @staticmethod
    def suits(stages: Sequence[SamplerStage], n_vocab: int) -> bool:
        """Whether the chain begins with stages that change single logits, of which a small TopK or Greedy chooses.

        After a TopK may come anything, since it sees what it would see anyway. Any other stage before one looks at the
        whole distribution, or makes equals of different logits as a temperature can, and leaves the chain whole. So
        does a token with two biases: among a part of the vocabulary llama.cpp applies only the first of them.
        """
        changing = _leading_changes(stages)
        tokens = [token for stage in changing if isinstance(stage, LogitBias) for token, _ in stage.biases]
        if len(tokens) > _MAX_BIASES or len(tokens) != len(set(tokens)):
            return False
        match stages[len(changing)]:
            case Greedy():
                return True
            case TopK(k):
                return 0 < k <= min(_MAX_TOP_K, n_vocab // 4)
            case _:
                return False

    def sample(self, context: Context, row: int) -> int:
        """Raises ``RuntimeFailure`` when the logits, or what biases and penalties make of them, are not numbers,
        or when no token is left to choose."""
        context = native_context(context)
        with self._native() as chain:
            token = self._choose(context, row)
            self._record(chain, token)
            return token

    def choose(self, context: Context, row: int) -> int:
        """``sample`` without recording the token."""
        context = native_context(context)
        with self._native():
            return self._choose(context, row)

    def choose_among(self, tokens: npt.NDArray[np.int32], logits: _Logits) -> int:
        """The same from a part of the vocabulary, given as parallel arrays with ascending tokens."""
        with self._native():
            array = TokenArray(len(tokens))  # not kept: 12 bytes a token are megabytes
            array.fill(tokens, logits)
            self._change(array)
            return array.chosen_by(self._choosing)

    def accept(self, token: int) -> None:
        """Raises ``InvalidArgument`` for a token outside of the vocabulary."""
        check_token(token, self._n_vocab)
        with self._native() as chain:
            self._record(chain, token)

    def reset(self) -> None:
        with self._native() as chain:
            native.llama_sampler_reset(chain)
            self._changed.clear()

    def _record(self, chain: int, token: int) -> None:
        if self._records:
            native.llama_sampler_accept(chain, token)
            self._changed.record(token)

    def _choose(self, context: NativeContext, row: int) -> int:
        if self._greedy:
            best, logit = context.best(row)
            check_largest_logit(logit)
            if best not in self._changed:
                if self._only_lowers:
                    return best
                with context.pointer():
                    return self._greatest(best, context.logits(row))
        found = context.candidates(row, self._n_sought)
        check_largest_logit(found.largest)
        if not self._greedy and self._only_lowers:
            n_changed = self._changed.count_in(found.tokens) if self._changes_logits else 0
            if len(found.words) - n_changed >= self._n_top and self._fill_found(found, n_changed):
                return self._array.chosen_by(self._choosing)
        with context.pointer():
            logits = context.logits(row)
            if self._changes_logits and self._fill_changed(found, logits):
                changed = self._change(self._array)
                if self._greedy or _top_is_strict(changed, self._n_top):
                    return self._array.chosen_by(self._choosing)
            return self.choose_among(np.arange(self._n_vocab, dtype=np.int32), logits)

    def _greatest(self, best: int, logits: _Logits) -> int:
        """Greedy, where the largest logit stays what it is: only a changed one can come before it."""
        tokens = _union(np.array([best], dtype=np.int32), self._changed.tokens())
        self._array.fill(tokens, logits[tokens])
        self._change(self._array)
        return self._array.chosen_by(self._choosing)

    def _fill_found(self, found: Candidates, n_changed: int) -> bool:
        """Put the candidates into the array, after the changes. False where equal ones have no order.

        Enough for changes that only lower: what was left out was below all candidates, of which ``n_top`` stay there.
        """
        self._array.copy(found.words)
        if not n_changed:
            return found.distinct
        return _top_is_strict(self._change(self._array), self._n_top)

    def _fill_changed(self, found: Candidates, logits: _Logits) -> bool:
        """Put all tokens into the array that may be in the top-k after the changes. False: they are too many.

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

    def _change(self, array: TokenArray) -> _Logits:
        """Apply biases, penalties and DRY; returns the logits."""
        if self._changes_logits:
            array.apply(self._changing)
        logits = array.logits
        largest = float(logits.max())
        if largest == -math.inf:
            raise no_token_left()
        check_largest_logit(largest)
        return logits


def _leading_changes(stages: Sequence[SamplerStage]) -> list[_Changing]:
    """The stages at the beginning of a chain that change single logits."""
    changing: list[_Changing] = []
    for stage in stages:
        if not isinstance(stage, LogitBias | Penalties | Dry):
            break
        changing.append(stage)
    return changing


def _only_lowers(stage: _Changing) -> bool:
    """Whether it raises no logit, whatever was said."""
    match stage:
        case LogitBias(biases):
            return all(bias <= 0 for _, bias in biases)
        case Penalties(_, repeat, frequency, presence):
            return repeat >= 1 and frequency >= 0 and presence >= 0
        case Dry():
            return True


class _ChangedTokens:
    """The tokens whose logits may be changed: those with a bias and those in the longest window of penalties or DRY."""

    def __init__(self, stages: Sequence[_Changing]) -> None:
        self._biased = [token for stage in stages if isinstance(stage, LogitBias) for token, _ in stage.biases]
        self._n_window = max((stage.last_n for stage in stages if isinstance(stage, Penalties | Dry)), default=0)
        self._window: deque[int] = deque()
        self._counts: dict[int, int] = {}  # how often each of these is in the list of biases or the window
        self.clear()

    def record(self, token: int) -> None:
        """Move the window on, as llama.cpp's samplers do."""
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

    def __contains__(self, token: int) -> bool:
        return token in self._counts

    def count_in(self, tokens: npt.NDArray[np.int32]) -> int:
        return sum(map(self._counts.__contains__, tokens.tolist()))

    def tokens(self) -> _Tokens:
        """Each once, in no order."""
        return np.fromiter(self._counts, dtype=np.intp, count=len(self._counts))


def _top_is_strict(logits: _Logits, n_top: int) -> bool:
    """Whether the ``n_top`` largest all differ from each other and from the next: then they have one order only."""
    top = np.sort(logits)[-(n_top + 1) :]
    return not bool((top[1:] == top[:-1]).any())


def _union(tokens: npt.NDArray[np.int32], others: _Tokens) -> _Tokens:
    """Ascending. ``np.union1d`` does the same in three times the time."""
    merged: _Tokens = np.concatenate((tokens, others))
    merged.sort()
    keep = np.empty(len(merged), dtype=np.bool_)
    keep[:1] = True
    np.not_equal(merged[1:], merged[:-1], out=keep[1:])
    return merged[keep]
