"""The whole configuration as the rest of the program sees it: every key has a value that was checked."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from wasi_nn_backend.config.backend import BackendSettings
from wasi_nn_backend.config.logging import LoggingSettings
from wasi_nn_backend.config.memory import MemorySettings
from wasi_nn_backend.config.model import ModelSettings
from wasi_nn_backend.config.performance import PerformanceSettings
from wasi_nn_backend.config.sampling import SamplingSettings
from wasi_nn_backend.config.session import SessionSettings
from wasi_nn_backend.config.stopping import StoppingSettings
from wasi_nn_backend.config.task import TaskSettings

__all__ = ["Settings"]


class Settings(BaseModel):
    """One frozen model a section. ``Settings()`` holds the built-in defaults."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    backend: BackendSettings = BackendSettings()
    model: ModelSettings = ModelSettings()
    sampling: SamplingSettings = SamplingSettings()
    stopping: StoppingSettings = StoppingSettings()
    memory: MemorySettings = MemorySettings()
    performance: PerformanceSettings = PerformanceSettings()
    session: SessionSettings = SessionSettings()
    task: TaskSettings = TaskSettings()
    logging: LoggingSettings = LoggingSettings()
