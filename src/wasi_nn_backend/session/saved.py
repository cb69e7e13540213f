"""A session on disk: messages, tokens and, if there are any, its KV cells.

The file is a magic line, a JSON header on one line, and the cells. The header carries the format's version, what the
model was, and a checksum over everything else, so that a damaged file, another model or a newer format is a clear error
and never a wrong answer. Files are written beside their target and renamed: a crash leaves the old one.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from wasi_nn_backend.engine import ExportedCells
from wasi_nn_backend.errors import InvalidArgument, NotFound, RuntimeFailure
from wasi_nn_backend.llama.interface import Model
from wasi_nn_backend.session.chat import Message

__all__ = ["SavedSession", "model_fingerprint", "read_session", "write_session"]

_MAGIC = b"wasi-nn-session\n"
_VERSION = 2
_N_HEADER_BYTES_MAX = 64 << 20
#: Of a model's file: enough to tell two trainings of one model apart, which differ in nearly every weight.
_N_SAMPLES = 64
_N_SAMPLE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class SavedSession:
    """``config`` is the context's own configuration layer. ``graph`` and ``path`` say where the model was loaded from.

    ``n_left_out`` of the first messages no longer fitted the window: who goes on leaves out the same ones.
    """

    fingerprint: str
    graph: str
    path: str
    config: dict[str, dict[str, Any]]
    messages: tuple[Message, ...]
    n_left_out: int
    cells: ExportedCells


def model_fingerprint(model: Model, path: Path) -> str:
    """Tells models apart by what they say of themselves and by samples of their file: hashing it all would read
    gigabytes. Raises ``RuntimeFailure`` when the file cannot be read."""
    metadata = sorted(model.metadata.items())
    facts = [model.description, model.n_params, model.n_weight_bytes, model.n_embd, metadata]
    digest = hashlib.sha256(json.dumps(facts).encode())
    try:
        with path.open("rb") as file:
            last = max(0, file.seek(0, os.SEEK_END) - _N_SAMPLE_BYTES)
            for n in range(_N_SAMPLES):
                file.seek(last * n // (_N_SAMPLES - 1))
                digest.update(file.read(_N_SAMPLE_BYTES))
    except OSError as error:
        raise RuntimeFailure(f"the model file {path} cannot be read again: {error.strerror or error}") from error
    return digest.hexdigest()


def write_session(path: str | Path, saved: SavedSession, *, part: Path | None = None) -> None:
    """``part`` is the file that is written first, for callers who are alone with it; None is one that nobody else has.

    Raises ``RuntimeFailure`` when the file cannot be written, what was there before stays then, and
    ``InvalidArgument`` (no path).
    """
    path = _checked(path)
    header = {
        "version": _VERSION,
        "fingerprint": saved.fingerprint,
        "graph": saved.graph,
        "path": saved.path,
        "config": saved.config,
        "messages": [[message.role, message.content] for message in saved.messages],
        "n_left_out": saved.n_left_out,
        "tokens": list(saved.cells.tokens),
        "n_tokens_exact": saved.cells.n_tokens_exact,
        "n_state_bytes": len(saved.cells.state),
    }
    body = json.dumps(header).encode()
    checksum = _checksum(body, saved.cells.state).encode()
    try:
        part = part or _new_part(path)
        try:
            # A conversation is its owner's: nobody else reads it.
            with open(part, "wb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o600)) as file:
                file.writelines([_MAGIC, checksum, b"\n", body, b"\n", saved.cells.state])
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RuntimeFailure(f"the session could not be saved to {path}: {error.strerror or error}") from error


def _checked(path: str | Path) -> Path:
    if not isinstance(path, str | Path):
        raise InvalidArgument(f"a saved session's path is a str or a Path, got {type(path).__name__}")
    if "\0" in str(path) or not _is_encodable(path):
        raise InvalidArgument(f"{str(path)!r} cannot be a file's path: leave out NUL and half a surrogate pair")
    return Path(path)


def _is_encodable(path: str | Path) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def read_session(path: str | Path) -> SavedSession:
    """Raises ``NotFound`` (no such file) and ``InvalidArgument`` (no path, no session, damaged, of another version)."""
    path = _checked(path)
    try:
        with path.open("rb") as file:
            magic, checksum = file.read(len(_MAGIC)), file.readline(80).strip()
            body = file.readline(_N_HEADER_BYTES_MAX)
            state = file.read()
    except FileNotFoundError as error:
        raise NotFound(f"there is no saved session {path}") from error
    except OSError as error:
        raise InvalidArgument(f"the saved session {path} cannot be read: {error.strerror or error}") from error
    if magic != _MAGIC:
        raise InvalidArgument(f"{path} is no saved session")
    if not body.endswith(b"\n") or _checksum(body[:-1], state) != checksum.decode("ascii", "replace"):
        raise InvalidArgument(f"the saved session {path} is damaged: its checksum does not fit")
    header = json.loads(body)  # it is what write_session wrote, or the checksum would not fit
    if header["version"] != _VERSION:
        raise InvalidArgument(
            f"the saved session {path} has format {header['version']}; this version reads format {_VERSION}"
        )
    return SavedSession(
        fingerprint=header["fingerprint"],
        graph=header["graph"],
        path=header["path"],
        config=header["config"],
        messages=tuple(Message(_role(role), content) for role, content in header["messages"]),
        n_left_out=header["n_left_out"],
        cells=ExportedCells(tuple(header["tokens"]), state, header["n_tokens_exact"]),
    )


def _new_part(path: Path) -> Path:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    return Path(name)


def _checksum(body: bytes, state: bytes) -> str:
    digest = hashlib.sha256(body)
    digest.update(state)
    return digest.hexdigest()


def _role(role: str) -> Literal["system", "user", "assistant"]:
    return cast(Literal["system", "user", "assistant"], role)
