"""What one guest may take from its host."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from wasi_nn_backend.errors import Busy

__all__ = ["Allowance", "HostLimits"]

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class HostLimits:
    """Limits per store. Too much of a thing that can be given back is ``Busy``, too large a thing is ``TooLarge``.

    ``max_graphs`` and ``max_contexts`` are wide: the official witx has no call that gives either back, and guests that
    load their model for each request never ran out of anything in WasmEdge, which hands out one graph a name. Graphs
    with equal model settings share weights and context, so that one costs about 12 kB; a context costs some 20 kB.
    ``backend.max_sessions`` closes idle contexts long before: those of the guest that has most.

    ``max_prompt_bytes`` is far above what fits the longest windows: tokenising 1 MiB takes a second.
    ``max_held_bytes`` bounds what all contexts and graphs hold of prompts and configuration together, and the tensors
    that a component has not dropped.
    ``max_open_runs`` counts token-by-token runs that are begun and not ended, each of which waits in the queue or holds
    cells. ``max_engine_settings`` counts, for each model, the different settings that need a llama.cpp context of their
    own (ctx-size and other keys of the section ``model``); ``max_ctx_tokens`` None leaves the length of a window to
    ``memory.max_memory_mb``.

    ``max_host_share`` is how much of the time (0 to 1) the host may spend on the guest's calls, the engine's work not
    counted; beyond that calls take longer (``pacing.py``).

    ``allow_load_bytes`` lets ``load`` take a model from the guest's memory; off by default, because such a model is
    parsed by native code and no one but the guest vouches for it. ``max_model_bytes`` bounds all builders of the graphs
    that are open then.

    ``unsized_output_bytes`` is for programs built with llama-core, which pass ``get_output`` and ``get_output_single``
    a real buffer and the length 0: such a call has room for so many bytes, the end of the guest's memory permitting.
    0: it has none. Concerns the guest's own memory only, and WasmEdge's dialect.
    """

    max_graphs: int = 1024
    max_contexts: int = 4096
    max_tensor_bytes: int = 64 * _MIB
    max_prompt_bytes: int = 4 * _MIB
    max_held_bytes: int = 64 * _MIB
    max_name_bytes: int = 4096
    max_config_bytes: int = _MIB
    max_dims: int = 64
    max_builders: int = 16
    max_open_runs: int = 8
    max_engine_settings: int = 8
    max_ctx_tokens: int | None = None
    max_host_share: float = 0.1
    allow_load_bytes: bool = False
    max_model_bytes: int = 4096 * _MIB
    unsized_output_bytes: int = 0


class Allowance:
    """So many bytes, over everything that one guest has the host keep. Used by the guest's thread."""

    def __init__(self, n_bytes_max: int, what: str) -> None:
        self._n_bytes_max = n_bytes_max
        self._what = what
        self._n_bytes_of: dict[Hashable, int] = {}
        self._n_bytes = 0

    def check(self, key: Hashable, n_bytes: int) -> None:
        """Raises ``Busy`` where ``n_bytes`` in place of what ``key`` has would be too many."""
        n_bytes_then = self._n_bytes - self._n_bytes_of.get(key, 0) + n_bytes
        if n_bytes_then > self._n_bytes_max:
            raise Busy(
                f"{self._what} would take {n_bytes_then} bytes together, and this host keeps {self._n_bytes_max} for a "
                "guest: give back contexts, graphs or tensors first"
            )

    def keep(self, key: Hashable, n_bytes: int) -> None:
        """``key`` has ``n_bytes`` now; 0 gives all of it back."""
        self._n_bytes += n_bytes - self._n_bytes_of.pop(key, 0)
        if n_bytes:
            self._n_bytes_of[key] = n_bytes
