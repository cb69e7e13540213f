"""Conversations that are kept in a directory, one file a session, written after every turn.

Messages only: the cells of a long conversation are megabytes, and computing them again takes a moment once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from pathlib import Path

from wasi_nn_backend.errors import Busy, NotFound, RuntimeFailure
from wasi_nn_backend.session.saved import SavedSession, read_session, write_session

__all__ = ["SessionFile", "SessionFiles"]

_log = logging.getLogger(__name__)


class SessionFile:
    """One session's file, claimed until ``release``."""

    def __init__(self, path: Path, files: SessionFiles) -> None:
        self.path = path
        self.part = path.with_suffix(".part")  # what is written first; left where the process was killed meanwhile
        self._files = files

    def read(self) -> SavedSession | None:
        """None before the first turn. Raises ``InvalidArgument`` for a damaged file, which stays where it is."""
        try:
            return read_session(self.path)
        except NotFound:
            return None

    def write(self, saved: SavedSession) -> None:
        """A turn that cannot be saved is logged: its answer is worth more than the file."""
        try:
            write_session(self.path, saved, part=self.part)
        except RuntimeFailure as error:
            _log.error("%s; this turn is lost when the program ends", error)

    def delete(self) -> None:
        """Raises ``RuntimeFailure`` where the system refuses."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise RuntimeFailure(f"{self.path} could not be removed: {error.strerror or error}") from error

    def release(self) -> None:
        self._files.release(self.path)


class SessionFiles:
    """Who writes which file: never two contexts of one backend the same. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._claimed: set[Path] = set()

    def claim(self, directory: str, graph: str, session_id: str) -> SessionFile:
        """The file of a session; the directory is made if there is none.

        Its name is a hash, so that no id leads elsewhere. Raises ``Busy`` while another context has it, and
        ``RuntimeFailure`` when the directory cannot be made.
        """
        folder = Path(directory).expanduser()
        digest = hashlib.sha256(json.dumps([graph, session_id]).encode()).hexdigest()
        path = folder / f"{digest}.session"
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(directory, error) from error
        with self._lock:
            if path in self._claimed:
                raise Busy(
                    f'the session "{session_id}" is open on another graph named "{graph}", and both would be saved to '
                    "one file: close it there first"
                )
            self._claimed.add(path)
        file = SessionFile(path, self)
        try:
            file.part.unlink(missing_ok=True)
        except OSError as error:
            file.release()
            raise _unusable(directory, error) from error
        return file

    def release(self, path: Path) -> None:
        with self._lock:
            self._claimed.discard(path)


def _unusable(directory: str, error: OSError) -> RuntimeFailure:
    return RuntimeFailure(
        f"backend.save_dir {directory!r} cannot be used: {error.strerror or error}; name another directory"
    )
