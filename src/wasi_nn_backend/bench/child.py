"""A scenario's process from the outside: starting it, reading its events, ending it with all that it started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from types import TracebackType
from typing import IO, Any, Self, cast

from wasi_nn_backend.bench.scenario import Options
from wasi_nn_backend.errors import RuntimeFailure

__all__ = ["ScenarioProcess"]

_N_LOG_BYTES = 2000


class ScenarioProcess:
    """``with`` starts it and sees to its end. ``stop`` may be called by any thread, at any time, more than once."""

    def __init__(self, module: str, options: Options) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by __exit__
        self._folder = tempfile.TemporaryDirectory(prefix="wasi-nn-bench-")  # what a killed process leaves goes with it
        self._lock = threading.Lock()
        self._stopped = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "wasi_nn_backend.bench.worker", module],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "TMPDIR": self._folder.name,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,  # a group of its own: Ctrl-C is this side's, and ``stop`` reaches what it starts
        )
        self._stdin, self._stdout = cast("IO[str]", self._process.stdin), cast("IO[str]", self._process.stdout)
        with contextlib.suppress(BrokenPipeError):  # it is gone, as reading will show
            self._stdin.write(json.dumps(asdict(options)) + "\n")
            self._stdin.flush()

    def events(self) -> Iterator[Mapping[str, Any]]:
        """``progress`` and ``row`` until the end. Raises ``RuntimeFailure`` when it failed."""
        for line in self._stdout:
            if not line.endswith("\n"):  # killed while it wrote
                break
            event = json.loads(line)
            if "error" in event:
                if self._stopped:  # what it started was killed before it
                    return
                raise RuntimeFailure(f"{event['error']}{self._last_words()}")
            if "end" in event:
                return
            yield event
        was_stopped = self._stopped
        status = self._end_of_group()
        if not was_stopped:
            cause = signal.Signals(-status).name if status < 0 else f"status {status}"
            raise RuntimeFailure(f"its process ended with {cause}{self._last_words()}")

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            if self._process.returncode is None:  # else the number may be another group's by now
                with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended (macOS: the latter)
                    os.killpg(self._process.pid, signal.SIGKILL)

    def _end_of_group(self) -> int:
        """Wait for the process without reaping it, so that its group can still be told, and end what it left behind."""
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        self.stop()
        return self._process.wait()

    def _last_words(self) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _N_LOG_BYTES))
        words = self._log.read().decode("utf-8", "replace").strip()
        return f"\n{words}" if words else ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._stdout.close()
        self._process.wait()
        self._log.close()
        self._folder.cleanup()
