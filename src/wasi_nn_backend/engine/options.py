"""What an engine is told when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from wasi_nn_backend.kvcache import PoolLimits
from wasi_nn_backend.llama.interface import KvLayout

__all__ = ["EngineOptions"]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """``id`` tells the engine from others of its backend, ``model`` is its model's file; both are for the status.

    ``n_ctx`` is one sequence's window in tokens, None the context's own; ``kv_bytes`` what the context's cells take.

    ``n_cells`` is how many cells all sequences share, None where each has its own. ``n_tokens_step_max`` bounds a
    step's tokens (None: the context's batch), ``n_running_max`` its sequences (None: all). ``company_wait_s`` is the
    longest that a first step waits for prompts that are announced. ``n_threads_max`` above 1 lets the engine choose the
    number of threads of each decode, up to it; 1 leaves it as the context has it. ``kv_layout`` and ``flash_attention``
    say what was chosen for the context.

    ``n_waiting_max`` requests may wait, ``n_waiting_warning`` are worth a warning. ``uses_priorities`` and
    ``shares_fairly`` are the scheduler's; ``drops_late_waiting`` ends requests whose time-out is over while they wait,
    which otherwise end when it is their turn.
    """

    id: int = 0
    model: str = ""
    n_ctx: int | None = None
    kv_bytes: int = 0
    n_cells: int | None = None
    limits: PoolLimits | None = None
    n_tokens_step_max: int | None = None
    n_running_max: int | None = None
    company_wait_s: float = 0.0
    n_threads_max: int = 1
    kv_layout: KvLayout = "streams"
    flash_attention: Literal["auto", "on", "off"] = "auto"
    n_waiting_max: int = 10_000
    n_waiting_warning: int = 10_000
    uses_priorities: bool = True
    shares_fairly: bool = True
    drops_late_waiting: bool = True
