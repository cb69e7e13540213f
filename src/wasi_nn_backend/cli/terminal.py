"""What a person sees besides the answer: loading progress and statistics, both on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from wasi_nn_backend.cli.interrupts import Cancellation

__all__ = ["format_bytes", "format_count", "load_progress", "write_answer"]


def write_answer(text: str) -> None:
    """Write a piece of a model's answer to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def load_progress(label: str, cancellation: Cancellation) -> Iterator[Callable[[float], bool]]:
    """A progress callback for ``load_by_name``: draws a bar where stderr is a terminal that can show one, and cancels
    after Ctrl-C."""
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield lambda _fraction: not cancellation.requested
        return
    # Imported here: rich takes longer to import than most commands take to print their help.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=1.0)

        def report(fraction: float) -> bool:
            progress.update(task, completed=fraction)
            return not cancellation.requested

        yield report


def format_bytes(n_bytes: int) -> str:
    """``1536`` as ``1.5 KiB``."""
    size = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{_short(size)} {unit}"
        size /= 1024
    return f"{_short(size)} TiB"


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


def format_count(count: int) -> str:
    """``134515008`` as ``134.5 million``."""
    for threshold, unit in ((10**9, "billion"), (10**6, "million")):
        if count >= threshold:
            return f"{_short(count / threshold)} {unit}"
    return f"{count:,}"
