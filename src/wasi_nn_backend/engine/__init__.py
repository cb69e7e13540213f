"""One thread per llama context: plan, apply KV operations, decode, sample, commit."""

from __future__ import annotations

from wasi_nn_backend.engine.embedding import Embedder, EmbeddingJob
from wasi_nn_backend.engine.generation import Generation, GenerationLimits, ShiftPolicy
from wasi_nn_backend.engine.loop import Engine
from wasi_nn_backend.engine.memory import ExportedCells
from wasi_nn_backend.engine.options import EngineOptions
from wasi_nn_backend.engine.sizing import N_CELLS_RESERVED, same_engine
from wasi_nn_backend.engine.statistics import EngineStatistics, SessionStatistics
from wasi_nn_backend.engine.steps import Steps, TextSteps, WaitPoint, iterate_steps, run_steps
from wasi_nn_backend.engine.store import EngineLease, EngineStore

__all__ = [
    "N_CELLS_RESERVED",
    "Embedder",
    "EmbeddingJob",
    "Engine",
    "EngineLease",
    "EngineOptions",
    "EngineStatistics",
    "EngineStore",
    "ExportedCells",
    "Generation",
    "GenerationLimits",
    "SessionStatistics",
    "ShiftPolicy",
    "Steps",
    "TextSteps",
    "WaitPoint",
    "iterate_steps",
    "run_steps",
    "same_engine",
]
