"""The sampler that leaves all the work to llama.cpp's chain, and what all native samplers check."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from wasi_nn_backend.errors import InvalidArgument, RuntimeFailure
from wasi_nn_backend.llama.bindings import native
from wasi_nn_backend.llama.context import NativeContext
from wasi_nn_backend.llama.interface import Context
from wasi_nn_backend.llama.links import LinkMaker
from wasi_nn_backend.llama.owner import Owner, Resource
from wasi_nn_backend.llama.stages import SamplerStage
from wasi_nn_backend.llama.token_array import TokenArray

__all__ = ["ChainSampler", "check_largest_logit", "check_token", "native_context"]


class ChainSampler(Owner):
    """A ``llama_sampler`` chain. Not thread-safe; different chains may sample one step's rows in parallel.

    ``llama_sampler_sample`` does the same in one call, but keeps a copy of the vocabulary for each chain, and records
    whatever it took, also where nothing could be chosen.
    """

    def __init__(self, links: LinkMaker, stages: Sequence[SamplerStage]) -> None:
        super().__init__(Resource("a sampler", links.chain(stages), native.llama_sampler_free, parent=links.model))
        self._n_vocab = links.n_vocab

    def sample(self, context: Context, row: int) -> int:
        """Raises ``RuntimeFailure`` when the logits are not numbers (llama.cpp would abort on some of them), or when
        no token is left to choose."""
        token = self.choose(context, row)
        self.accept(token)
        return token

    def choose(self, context: Context, row: int) -> int:
        """``sample`` without recording the token."""
        with native_context(context).pointer():
            logits = context.logits(row)
            check_largest_logit(float(logits.max()))
            return self.choose_among(np.arange(self._n_vocab, dtype=np.int32), logits)

    def choose_among(self, tokens: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> int:
        """The same from a part of the vocabulary, given as parallel arrays."""
        with self._native() as chain:
            array = TokenArray(len(tokens))  # not kept: 12 bytes a token are megabytes
            array.fill(tokens, logits)
            return array.chosen_by(chain)

    def accept(self, token: int) -> None:
        """Raises ``InvalidArgument`` for a token outside of the vocabulary."""
        check_token(token, self._n_vocab)
        with self._native() as chain:
            native.llama_sampler_accept(chain, token)

    def reset(self) -> None:
        with self._native() as chain:
            native.llama_sampler_reset(chain)


def native_context(context: Context) -> NativeContext:
    if not isinstance(context, NativeContext):
        raise InvalidArgument(f"a native sampler needs a native context, not {type(context).__name__}")
    return context


def check_token(token: int, n_vocab: int) -> None:
    if not 0 <= token < n_vocab:
        raise InvalidArgument(f"token {token} is outside of the vocabulary of {n_vocab}")


def check_largest_logit(largest_logit: float) -> None:
    """Raises ``RuntimeFailure`` for an infinity or NaN. numpy's max is NaN when one of the values is."""
    if not math.isfinite(largest_logit):
        raise RuntimeFailure(
            f"the model computed {largest_logit} as its largest logit; its file is damaged or its weights do not fit "
            "the chosen cache type"
        )
