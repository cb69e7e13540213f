"""A backend that shows the person at the terminal when a guest's call loads a model.

Imported when a command runs, not before: the backend below it loads llama.cpp.
"""

from __future__ import annotations

from pathlib import Path

from wasi_nn_backend import Backend, Graph
from wasi_nn_backend.cli.interrupts import Cancellation
from wasi_nn_backend.cli.terminal import load_progress
from wasi_nn_backend.config import ConfigSource
from wasi_nn_backend.llama.interface import ProgressCallback
from wasi_nn_backend.types import PYTHON_DOOR, Door

__all__ = ["ProgressBackend"]


class ProgressBackend(Backend):
    """Draws each load on stderr and lets ``cancellation`` end it, besides the caller's own ``progress``."""

    def __init__(self, config: ConfigSource, cancellation: Cancellation) -> None:
        super().__init__(config)
        self._cancellation = cancellation

    def load_by_name_with_config(
        self,
        name: str | Path,
        config: ConfigSource,
        *,
        door: Door = PYTHON_DOOR,
        progress: ProgressCallback | None = None,
    ) -> Graph:
        with load_progress(f"Loading {name}", self._cancellation) as show:

            def show_and_ask(fraction: float) -> bool:
                may_go_on = progress is None or progress(fraction) is not False
                return show(fraction) and may_go_on

            return super().load_by_name_with_config(name, config, door=door, progress=show_and_ask)
