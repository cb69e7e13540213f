"""A text's vector as guests get it."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["embedding_json"]


def embedding_json(vector: Sequence[float]) -> bytes:
    """``{"n_embedding": 2, "embedding": [0.6,0.8]}``: ten significant digits and no space between the values.

    That is how WasmEdge writes it, and its guests take such text apart by hand, too.
    """
    values = ",".join(f"{value:.10g}" for value in vector)
    return f'{{"n_embedding": {len(vector)}, "embedding": [{values}]}}'.encode()
