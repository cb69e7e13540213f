"""Which tokens live where. Pure accounting: it proposes operations, the engine applies them."""

from __future__ import annotations

from wasi_nn_backend.kvcache.pool import Assignment, RemoveTail, StreamPool

__all__ = ["Assignment", "RemoveTail", "StreamPool"]
