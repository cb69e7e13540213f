"""The ``wasi-nn`` command for people: run modules, generate, chat, inspect files.

This module holds only the entry point, so that importing it costs nothing and Ctrl-C is caught before the larger
imports begin.
"""

from __future__ import annotations

from collections.abc import Sequence

from wasi_nn_backend.cli.termination import Terminated, sigterm_raises

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's) and return its exit status."""
    try:
        with sigterm_raises():
            from wasi_nn_backend.cli.streams import prepare_streams

            prepare_streams()
            from wasi_nn_backend.cli.app import run_command_line

            return run_command_line(argv)
    except KeyboardInterrupt:
        # Ctrl-C during the imports; later ones are translated where the work runs. 130 is what shells expect.
        return 130
    except Terminated:
        return 143
