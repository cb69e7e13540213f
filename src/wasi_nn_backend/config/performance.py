"""``performance``: how requests share steps."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from wasi_nn_backend.config.section import Key, Section

__all__ = ["PerformanceSettings"]


class PerformanceSettings(Section):
    """``batch_processing`` off: one request of a graph at a time. ``batch_size`` is the most tokens of one step (1 to
    2048), by default ``model.batch_size``: a smaller one lets long prompts delay others less, and takes longer for
    them. ``batch_timeout_ms`` is the longest that a request which finds nobody running waits for others whose prompts
    are set already, so that they start in one batch; 0 never waits. A lone request does not wait.
    """

    batch_processing: Annotated[bool, Field(description="off: one request of a graph at a time, the others wait")] = (
        True
    )
    batch_size: Annotated[
        int,
        Field(
            ge=1,
            le=2048,
            description="tokens in one step, `model.batch_size` if not given: with fewer, long prompts delay others "
            "less and take longer. Only in its section: at the top level `batch_size` is the model's",
        ),
        Key(nested_only=True),
    ] = 512
    batch_timeout_ms: Annotated[
        int,
        Field(
            ge=0,
            le=10_000,
            description="the longest that a request which finds nobody running waits for others whose prompts are set, "
            "to start with them; a lone one does not wait",
        ),
    ] = 100
