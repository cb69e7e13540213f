"""One generation, as the scheduler sees it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from wasi_nn_backend.errors import InvalidArgument

__all__ = ["Request", "RequestState"]


class RequestState(enum.Enum):
    """waiting -> running -> finished; running -> paused -> waiting, when its consumer does not keep up; running ->
    waiting, when it is interrupted for somebody else."""

    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """Tokens to compute and tokens to generate for one session.

    ``tokens`` holds the prompt and then what was generated. ``n_tokens_computed`` of them are in the KV cache; the rest
    is pending: a long prompt, or the one token sampled last. A request that lost its stream has all of them pending
    again and needs no other treatment than a new one.

    ``salt`` keeps tenants apart: prefixes are shared only among equal ones.

    ``priority`` is 0 for the lowest. ``user`` is whose share of the batch it takes. ``arrival`` is the scheduler's.
    ``has_started`` stays true when it is interrupted.

    ``n_tokens_decoded`` went through the model for it, whatever was cached, shifted or lost.

    ``credit_tokens`` is how many tokens may be generated before the consumer asks for more; None is no limit.
    """

    id: int
    session_id: int
    tokens: list[int]
    credit_tokens: int | None = None
    salt: str = ""
    priority: int = 0
    user: str = ""
    arrival: int = 0
    has_started: bool = False
    n_interruptions: int = 0
    n_tokens_prompt: int = 0
    n_tokens_generated: int = 0
    n_tokens_computed: int = 0
    n_tokens_decoded: int = 0
    n_tokens_reused: int = 0
    n_tokens_shared: int = 0
    n_tokens_recomputed: int = 0
    n_tokens_shifted: int = 0
    stream: int | None = None
    state: RequestState = RequestState.WAITING

    def __post_init__(self) -> None:
        if not self.tokens:
            raise InvalidArgument("a request needs at least one prompt token; the prompt is empty")
        self.n_tokens_prompt = len(self.tokens)

    @property
    def n_tokens_pending(self) -> int:
        return len(self.tokens) - self.n_tokens_computed
