"""Configuration from a file: a path, or a string ``@path``. Only for callers that may read the host's files."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Final

from wasi_nn_backend.config.jsontext import N_BYTES_MAX
from wasi_nn_backend.errors import InvalidArgument, NotFound

__all__ = ["named_file", "read_file"]

_MARK: Final = "@"


def named_file(source: object) -> Path | None:
    """The file that a configuration source names; None for one that holds the configuration itself."""
    if isinstance(source, Path):
        return source
    if isinstance(source, bytes):
        text = source[: len(_MARK)].decode("latin-1")
        return Path(source[len(_MARK) :].decode("utf-8", "surrogateescape")) if text == _MARK else None
    return Path(source[len(_MARK) :]) if isinstance(source, str) and source.startswith(_MARK) else None


def read_file(path: Path, *, may_wait: bool = False) -> bytes:
    """The file's bytes, one more than are allowed at most. Raises ``NotFound`` and ``InvalidArgument``.

    Regular files only, unless the caller ``may_wait``: opening a pipe that nobody writes to would last for ever.
    """
    try:
        path = path.expanduser()
        if not may_wait and not stat.S_ISREG(path.stat().st_mode):
            raise InvalidArgument(f"{str(path)!r} is no regular file; name a file with JSON in it")
        with path.open("rb") as file:
            return file.read(N_BYTES_MAX + 1)
    except FileNotFoundError:
        raise NotFound(f"there is no configuration file {str(path)!r}; check the path") from None
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a NUL in the path; RuntimeError: no home folder
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidArgument(
            f"the configuration file {str(path)!r} cannot be read: {reason}; check the path and your permissions"
        ) from None
