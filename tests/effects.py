"""Which configuration keys a test shows to change what the program does.

``@changes("sampling.top_k")`` on a test says that it fails if the key is parsed and then ignored.
``test_key_effects.py`` collects these marks and holds them against the keys that the models know.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["changed_keys", "changes"]

_TESTS = Path(__file__).parent
_MARK = "@changes("
_ATTRIBUTE = "keys_that_it_changes"

_F = TypeVar("_F", bound=Callable[..., object])


def changes(*keys: str) -> Callable[[_F], _F]:
    """``keys`` are written ``section.key``."""

    def mark(test: _F) -> _F:
        setattr(test, _ATTRIBUTE, (*getattr(test, _ATTRIBUTE, ()), *keys))
        return test

    return mark


def changed_keys() -> dict[str, list[str]]:
    """Key -> names of the tests of all test files that change it."""
    found: dict[str, list[str]] = {}
    for file in sorted(_TESTS.rglob("test_*.py")):
        if _MARK not in file.read_text(encoding="utf-8"):
            continue
        name = ".".join(file.relative_to(_TESTS.parent).with_suffix("").parts)
        for test in vars(importlib.import_module(name)).values():
            for key in getattr(test, _ATTRIBUTE, ()):
                found.setdefault(key, []).append(f"{name}.{test.__name__}")
    return found
