"""Reads ``/status.json`` of another process that serves its figures.

Imported when a command runs, not before: pydantic and urllib take longer to import than a help text takes to print.
"""

from __future__ import annotations

import re
from http.client import HTTPException
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, build_opener

from pydantic import BaseModel, ValidationError

from wasi_nn_backend.errors import InvalidArgument, RuntimeFailure

__all__ = ["BackendSample", "EngineSample", "GraphSample", "StatusSample", "TaskSample", "fetch_status", "server_url"]

_N_BYTES_MAX = 1 << 26
_TIMEOUT_S = 10.0
_PORT = re.compile(r":?(\d{1,5})")


class EngineSample(BaseModel):
    id: int
    n_steps: int
    n_sequence_steps: int
    n_sequences: int
    n_running: int
    n_cells: int
    n_cells_used: int
    n_host_bytes: int


class GraphSample(BaseModel):
    name: str
    n_sessions: int
    n_queued: int
    n_running: int
    engine: EngineSample


class TaskSample(BaseModel):
    graph: str
    n_by_reason: dict[str, int]
    n_tokens_computed: int
    n_tokens_generated: int


class BackendSample(BaseModel):
    name: str
    graphs: list[GraphSample]
    engines: list[EngineSample]
    tasks: list[TaskSample]
    now_s: float


class StatusSample(BaseModel):
    """What of the status is shown; other fields are passed over."""

    pid: int
    backends: list[BackendSample]


def server_url(place: str) -> str:
    """``http://host:port`` of ``9100``, ``host:9100`` or any URL of the server. Raises ``InvalidArgument``."""
    port = _PORT.fullmatch(place)
    text = f"http://127.0.0.1:{port[1]}" if port else place if "://" in place else f"http://{place}"
    try:
        parts = urlsplit(text)
        has_port = parts.port is not None
    except ValueError:
        parts, has_port = urlsplit(""), False
    if parts.scheme not in ("http", "https") or not parts.hostname or not has_port:
        raise InvalidArgument(
            f"{place!r} is no address of figures: give a port, or a URL such as http://127.0.0.1:9100"
        )
    return f"{parts.scheme}://{parts.netloc}"


def fetch_status(url: str) -> StatusSample:
    """``url`` is the server's. Raises ``RuntimeFailure`` when nobody answers, or not as expected."""
    opener = build_opener(ProxyHandler({}))  # figures are nearby: a proxy would look for 127.0.0.1 at itself
    try:
        with opener.open(f"{url}/status.json", timeout=_TIMEOUT_S) as response:
            body = response.read(_N_BYTES_MAX)
    except HTTPError as error:
        raise RuntimeFailure(_not_ours(url, f"with status {error.code}")) from error
    except (URLError, OSError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        text = reason.strerror if isinstance(reason, OSError) and reason.strerror else reason
        raise RuntimeFailure(f"no answer from {url}: {text}; is it running, with --metrics-port?") from error
    except (HTTPException, ValueError) as error:
        raise RuntimeFailure(_not_ours(url, "with something else")) from error
    try:
        return StatusSample.model_validate_json(body)
    except ValidationError as error:
        raise RuntimeFailure(_not_ours(url, "with something else")) from error


def _not_ours(url: str, how: str) -> str:
    return f"{url} answered {how}, not with a status: give the port that --metrics-port printed"
