"""Where this package keeps what it could make again: results of probes, compiled modules and libraries."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["user_cache_folder"]


def user_cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Its folder among the user's caches, which may not exist yet. Raises ``RuntimeError`` for a user without a home.

    Source: the XDG base directory specification, which has relative paths ignored.
    """
    base = environ.get("XDG_CACHE_HOME", "")
    home = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return home / "wasi-nn-backend"
