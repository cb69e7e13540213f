"""``backend``: what holds for all graphs of one backend."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from wasi_nn_backend.config.section import Section

__all__ = ["BackendSettings"]


class BackendSettings(Section):
    """``max_concurrent`` is how many sequences of one graph are generated at the same time (1 to 256)."""

    max_concurrent: Annotated[int, Field(ge=1, le=256)] = 10
