"""What the layers above may ask of a llama that turns texts into vectors. See ``interface.py`` for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["EmbeddingContext"]


class EmbeddingContext(Protocol):
    """A llama context that gives vectors and keeps nothing from one call to the next.

    Every method but ``request_abort`` and ``close`` belongs to one thread.
    """

    @property
    def n_embd(self) -> int:
        """Values of one vector."""

    @property
    def n_tokens_max(self) -> int:
        """Of one text."""

    @property
    def n_batch(self) -> int:
        """Tokens of all texts of one call, at least as many as were asked for."""

    @property
    def n_sequences(self) -> int:
        """Texts of one call. It may be less than what was asked for."""

    def embed(self, texts: Sequence[Sequence[int]]) -> npt.NDArray[np.float32] | None:
        """One vector a text, shape [n_texts, n_embd], not normalised; None when it was aborted.

        It is the pooled vector where the model pools, else the last token's. ``InvalidArgument``, before anything is
        computed, for texts that are empty, too long or too many, and for tokens outside of the vocabulary.
        """

    def request_abort(self) -> None:
        """Make an ``embed`` that runs now return None soon; without effect when none runs. Any thread may call it."""

    def close(self) -> None: ...
