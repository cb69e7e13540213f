"""Which tokens live where. Pure accounting: it proposes operations, the engine applies them."""

from __future__ import annotations

from wasi_nn_backend.kvcache.eviction import N_TOKENS_SHARED_MIN
from wasi_nn_backend.kvcache.operations import (
    CopyStream,
    DropHostState,
    KvOperation,
    RemoveTail,
    RestoreState,
    SaveState,
)
from wasi_nn_backend.kvcache.pool import StreamPool
from wasi_nn_backend.kvcache.prefix import common_prefix_length
from wasi_nn_backend.kvcache.records import Assignment, CacheStrategy, PoolLimits

__all__ = [
    "N_TOKENS_SHARED_MIN",
    "Assignment",
    "CacheStrategy",
    "CopyStream",
    "DropHostState",
    "KvOperation",
    "PoolLimits",
    "RemoveTail",
    "RestoreState",
    "SaveState",
    "StreamPool",
    "common_prefix_length",
]
