"""What one guest may take from its host."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["HostLimits"]

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class HostLimits:
    """Limits per store. Too much of a thing that can be given back is ``Busy``, too large a thing is ``TooLarge``.

    ``allow_load_bytes`` lets ``load`` take a model from the guest's memory; off by default, because such a model is
    parsed by native code and no one but the guest vouches for it. ``max_model_bytes`` bounds the builders' sum then.

    ``max_graphs`` and ``max_contexts`` are wide: the official witx has no call that gives either back, and guests that
    load their model for each request never ran out of anything in WasmEdge, which hands out one graph a name. Graphs
    with equal model settings share weights and context, so that one costs about 12 kB; a context costs some 20 kB.
    """

    max_graphs: int = 1024
    max_contexts: int = 16384
    max_tensor_bytes: int = 64 * _MIB
    max_name_bytes: int = 4096
    max_config_bytes: int = _MIB
    max_dims: int = 64
    max_builders: int = 16
    allow_load_bytes: bool = False
    max_model_bytes: int = 4096 * _MIB
