"""The process's three streams, made safe to use before anything else happens."""

from __future__ import annotations

import codecs
import io
import os
import sys

__all__ = ["close_stdout", "prepare_streams"]


def prepare_streams() -> None:
    """Make stdin, stdout and stderr usable, however the process was started.

    A stream that was closed (``wasi-nn ... >&-``, some service managers) becomes the null device. Without that Python
    has no object for it, and the next file that is opened, a model perhaps, gets its number and the guest's output.
    What stdout's encoding lacks becomes a question mark instead of an error, and file names that are not UTF-8 come out
    as they came in.
    """
    _open_if_closed("stdin", 0, "r")
    _open_if_closed("stdout", 1, "w")
    _open_if_closed("stderr", 2, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        is_utf_8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
        sys.stdout.reconfigure(errors="surrogateescape" if is_utf_8 else "replace")


def _open_if_closed(name: str, descriptor: int, mode: str) -> None:
    if getattr(sys, name) is not None:
        return
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
    os.set_inheritable(descriptor, True)
    setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))


def close_stdout() -> None:
    """Point stdout at nothing once it cannot be written, or Python complains about it while it exits."""
    try:
        stdout_fd = sys.stdout.fileno()
    except (OSError, ValueError):
        return  # a test's stand-in for stdout has no descriptor to point elsewhere
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, stdout_fd)
    os.close(devnull)
