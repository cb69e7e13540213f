"""A scenario's measurement in a process of its own: ``python -m wasi_nn_backend.bench.worker MODULE``.

Each scenario finds a fresh process, so none measures what another left in memory, a crash costs one of them, and
whatever it does can be ended. Options come in as a line of JSON, events go out, one a line: ``{"progress": text}``,
``{"row": {...}}``, at last ``{"end": true}`` or ``{"error": text}``. ``bench/child.py`` is the other side.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from typing import Any, TextIO

from wasi_nn_backend.bench.scenario import Options, load_scenario
from wasi_nn_backend.errors import WasiNNError

__all__ = ["main"]


class _Progress(logging.Handler):
    """What ``show_progress`` logs, as events."""

    def __init__(self, events: TextIO) -> None:
        super().__init__(logging.INFO)
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        send(self._events, {"progress": record.getMessage()})


def main() -> None:
    # The scenario may print: events get a descriptor of their own, and what goes to stdout joins stderr.
    events = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)
    log = logging.getLogger("wasi_nn_backend.bench")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.addHandler(_Progress(events))
    try:
        scenario = load_scenario(sys.argv[1])
        for row in scenario.measure(Options(**json.loads(sys.stdin.readline()))):
            scenario.check(row)
            send(events, {"row": row.model_dump()})
        send(events, {"end": True})
    except (Exception, SystemExit) as error:  # the modules' mains leave through SystemExit; the parent reports it
        if not isinstance(error, WasiNNError):  # its message says all; where it was raised is for defects
            traceback.print_exc()
        send(events, {"error": str(error) or type(error).__name__})


def send(events: TextIO, event: dict[str, Any]) -> None:
    events.write(json.dumps(event) + "\n")


if __name__ == "__main__":
    main()
