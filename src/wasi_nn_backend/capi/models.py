"""Which models a C host's callers may load, by the rules of the environment."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from wasi_nn_backend.errors import InvalidArgument, ModelNotFound, NotFound, SecurityViolation
from wasi_nn_backend.registry import model_path

__all__ = ["Environment"]

_log = logging.getLogger(__name__)

_N_COMPONENT_BYTES_MAX = 255


@dataclass(frozen=True, slots=True)
class Environment:
    """The variables of the environment as they were when a backend was opened.

    ``models`` maps names to paths or built-in models, ``folders`` is searched in order. With one of the two, no other
    name may be loaded unless ``allows_any_path``; with neither, that depends on who calls. ``allows_bytes`` lets
    callers that are not trusted pass a model's bytes.
    """

    models: Mapping[str, str] = field(default_factory=dict)
    folders: tuple[Path, ...] = ()
    allows_any_path: bool = False
    allows_bytes: bool = False
    config_file: Path | None = None

    @classmethod
    def read(cls, getenv: Callable[[str], str | None]) -> Environment:
        """Raises ``InvalidArgument`` for an entry of WASI_NN_MODELS that is no ``name=path``."""
        models = {}
        for entry in filter(None, (getenv("WASI_NN_MODELS") or "").split(os.pathsep)):
            name, equals, path = entry.partition("=")
            if not (name and equals and path):
                raise InvalidArgument(f'WASI_NN_MODELS has the entry "{entry}": write name=path, separated by colons')
            models[name] = path
        folders = filter(None, (getenv("WASI_NN_MODEL_DIR") or "").split(os.pathsep))
        config = getenv("WASI_NN_CONFIG")
        return cls(
            models=models,
            folders=tuple(map(Path, folders)),
            allows_any_path=getenv("WASI_NN_ALLOW_ANY_PATH") == "1",
            allows_bytes=getenv("WASI_NN_ALLOW_LOAD_BYTES") == "1",
            config_file=Path(config) if config else None,
        )

    def find(self, name: str, *, is_trusted: bool) -> Path:
        """The file that a caller's name stands for.

        Raises ``SecurityViolation`` (and logs the rule), ``NotFound``, ``ModelNotFound``, ``InvalidArgument``.
        """
        if "\0" in name or any(len(os.fsencode(part)) > _N_COMPONENT_BYTES_MAX for part in name.split("/")):
            rule = "the model's name holds a NUL or a part of more than 255 bytes: shorten it"
            _log.warning("a model is refused: %s", rule)
            raise InvalidArgument(rule)
        if name in self.models:
            return model_path(self.models[name])
        for folder in self.folders:
            path = self._inside(folder, name)
            if path is not None:
                return path
        if self.allows_any_path or (is_trusted and not self.models and not self.folders):
            return self._anywhere(name)
        if os.sep in name and not self.folders:
            raise self._refused(name, "paths are not allowed here; set WASI_NN_ALLOW_ANY_PATH=1, or WASI_NN_MODEL_DIR")
        if not self.models and not self.folders:
            raise self._refused(name, "no model is allowed here; set WASI_NN_MODELS or WASI_NN_MODEL_DIR")
        raise NotFound(f'there is no model "{name}" in WASI_NN_MODELS and WASI_NN_MODEL_DIR; add it there')

    def check_bytes(self, *, is_trusted: bool) -> None:
        """May a caller pass a model's bytes? Raises ``SecurityViolation`` (and logs the rule) where it may not.

        Who may load any file may pass its bytes.
        """
        if not (is_trusted or self.allows_bytes or self.allows_any_path):
            rule = "only names are allowed here; load it by its name, or set WASI_NN_ALLOW_LOAD_BYTES=1"
            _log.warning("a model's bytes are refused: %s", rule)
            raise SecurityViolation(f"a model's bytes are refused: {rule}")

    def _inside(self, folder: Path, name: str) -> Path | None:
        """The file below a folder; None when there is none. What leads out of the folder is refused, there or not."""
        if os.path.isabs(name) and not self.allows_any_path:
            raise self._refused(name, "absolute paths are not allowed; name a file below WASI_NN_MODEL_DIR")
        if ".." in name.split("/") and not self.allows_any_path:
            raise self._refused(name, '".." is not allowed; name a file below WASI_NN_MODEL_DIR')
        try:
            real = (folder / name).resolve(strict=True)
            is_inside = real.is_relative_to(folder.resolve(strict=True))
        except (OSError, RuntimeError):  # missing, not readable, or links that lead in a circle
            return None
        if not is_inside:
            if self.allows_any_path:
                return None
            raise self._refused(name, "it is a symbolic link that leads out of WASI_NN_MODEL_DIR")
        return real if real.is_file() else None

    def _anywhere(self, name: str) -> Path:
        path = model_path(name)
        if not os.path.exists(path):  # also for a path that is too long once it is complete
            raise ModelNotFound(f'there is no model file "{name}"; check the path, and where the host was started')
        if not path.is_file():
            raise InvalidArgument(f'"{name}" is no regular file; name a GGUF file')
        return path

    def _refused(self, name: str, rule: str) -> SecurityViolation:
        _log.warning("the model %r is refused: %s", name, rule)
        return SecurityViolation(f'the model "{name}" is refused: {rule}')
