"""Who goes next. Pure: no pointers, no threads, no clock."""

from __future__ import annotations

from wasi_nn_backend.scheduler.plan import Chunk, StepPlan
from wasi_nn_backend.scheduler.request import Request, RequestState
from wasi_nn_backend.scheduler.scheduler import Scheduler, SchedulingRules

__all__ = ["Chunk", "Request", "RequestState", "Scheduler", "SchedulingRules", "StepPlan"]
