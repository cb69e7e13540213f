"""``memory`` (also spelled ``memory_policy``): how much memory sequences may take."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from wasi_nn_backend.config.section import INT32_MAX, Key, Section, zero_or_at_least

__all__ = ["MemorySettings"]


class MemorySettings(Section):
    """``max_memory_mb`` is in MiB; 0 sets no limit, less than 64 could not hold the smallest cache."""

    max_memory_mb: Annotated[int, Field(le=INT32_MAX), zero_or_at_least(64), Key(outside="default")] = 8192
