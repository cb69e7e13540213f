"""``backend``: what holds for all graphs of one backend."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from wasi_nn_backend.config.section import Key, Section, text_of_at_most

__all__ = ["BackendSettings"]


class BackendSettings(Section):
    """Limits of one backend. Times are in milliseconds. The thresholds are at most ``queue_size``."""

    max_sessions: Annotated[int, Field(ge=1, le=10_000, description="sessions that are kept at the same time")] = 100
    idle_timeout_ms: Annotated[
        int, Field(ge=1, le=86_400_000, description="a session that nobody used for so long is forgotten")
    ] = 300_000
    auto_cleanup: Annotated[
        bool,
        Field(description="forget idle sessions"),
        Key(("auto_cleanup_enabled", "auto_cleanup_sessions")),
    ] = True
    max_concurrent: Annotated[
        int, Field(ge=1, le=256, description="sequences of one graph that run at the same time; further ones wait")
    ] = 10
    queue_size: Annotated[int, Field(ge=1, le=10_000, description="tasks that may wait")] = 500
    default_task_timeout_ms: Annotated[
        int,
        Field(ge=0, le=600_000, description="a task without a time-out of its own ends after this time; 0: never"),
    ] = 30_000
    priority_scheduling_enabled: Annotated[bool, Field(description="`task.priority` counts")] = True
    fair_scheduling_enabled: Annotated[bool, Field(description="users take turns")] = True
    auto_queue_cleanup: Annotated[bool, Field(description="drop waiting tasks whose time is up")] = True
    queue_warning_threshold: Annotated[
        int, Field(ge=1, le=10_000, description="so many waiting tasks are worth a warning; at most `queue_size`")
    ] = 400
    queue_reject_threshold: Annotated[
        int,
        Field(ge=1, le=10_000, description="beyond so many waiting tasks new ones are refused; at most `queue_size`"),
    ] = 500
    save_dir: Annotated[
        str,
        Field(
            description="a directory that keeps the finished turns of sessions with a `session_id`, and from which "
            "they go on after a restart; empty: none"
        ),
        text_of_at_most(4096),
    ] = ""
