"""From token bytes to what a caller sees: whole characters, stop strings, metadata."""

from __future__ import annotations

from wasi_nn_backend.output.embedding import embedding_json
from wasi_nn_backend.output.metadata import FinishReason, RunMetadata
from wasi_nn_backend.output.text import TextAssembler

__all__ = ["FinishReason", "RunMetadata", "TextAssembler", "embedding_json"]
