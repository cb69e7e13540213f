"""One thread per llama context: plan, apply KV operations, decode, sample, commit."""

from __future__ import annotations

from wasi_nn_backend.engine.generation import Generation, GenerationLimits, ShiftPolicy
from wasi_nn_backend.engine.loop import Engine, EngineOptions
from wasi_nn_backend.engine.sizing import same_engine
from wasi_nn_backend.engine.statistics import EngineStatistics
from wasi_nn_backend.engine.store import EngineLease, EngineStore

__all__ = [
    "Engine",
    "EngineLease",
    "EngineOptions",
    "EngineStatistics",
    "EngineStore",
    "Generation",
    "GenerationLimits",
    "ShiftPolicy",
    "same_engine",
]
