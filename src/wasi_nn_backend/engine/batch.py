"""From a step's plan to llama's batch."""

from __future__ import annotations

from wasi_nn_backend.llama.interface import DecodeBatch
from wasi_nn_backend.scheduler import StepPlan

__all__ = ["fill_batch"]


def fill_batch(batch: DecodeBatch, plan: StepPlan) -> list[int]:
    """Fill ``batch`` with the plan's chunks; returns one row a chunk, that of its last token."""
    batch.clear()
    return [
        batch.add(
            chunk.request.tokens[chunk.first_position : chunk.first_position + chunk.n_tokens],
            chunk.first_position,
            chunk.stream,
            logits_for_last=chunk.samples,
        )
        for chunk in plan.chunks
    ]
