"""Which samplers run, in which order, with which numbers. The native chain is built by ``llama``."""

from __future__ import annotations

from wasi_nn_backend.sampling.chain import build_stages

__all__ = ["build_stages"]
