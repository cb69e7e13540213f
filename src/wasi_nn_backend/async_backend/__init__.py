"""The same backend for programs on asyncio: each call is one to await, and cancelling its task cancels the call.

This is ``Backend`` with other waiting, not another one: what waits for an engine holds no thread, so that a thousand
computes need no more threads than one.
"""

from __future__ import annotations

from wasi_nn_backend.async_backend.backend import AsyncBackend
from wasi_nn_backend.async_backend.execution_context import AsyncExecutionContext
from wasi_nn_backend.async_backend.graph import AsyncGraph

__all__ = ["AsyncBackend", "AsyncExecutionContext", "AsyncGraph"]
