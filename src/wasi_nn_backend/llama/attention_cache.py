"""Where measurements of ``attention_probe`` outlive the process: one small JSON file a user."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wasi_nn_backend.llama.attention_probe import AttentionOption

__all__ = ["read_times", "write_times"]

#: Raised when what is measured changes, so that older numbers are not compared with new ones.
_VERSION = 1
_MAX_ENTRIES = 64


def read_times(path: Path | None, key: str, options: Sequence[AttentionOption]) -> dict[AttentionOption, float] | None:
    """Seconds for each option that was measured under ``key``; None when there are none, or the file is damaged."""
    entry = _read(path).get(key)
    if not isinstance(entry, dict):
        return None
    seconds = {option: entry[str(option)] for option in options if str(option) in entry}
    is_valid = all(isinstance(value, float) and math.isfinite(value) and value > 0 for value in seconds.values())
    return seconds if seconds and is_valid else None


def write_times(path: Path | None, key: str, seconds: Mapping[AttentionOption, float]) -> None:
    """Add an entry; the oldest go when there are many. Of two processes that write at once, one may be lost."""
    if path is None:
        return
    entries = _read(path)
    entries.pop(key, None)
    entries[key] = {str(option): value for option, value in seconds.items()}
    newest = dict(list(entries.items())[-_MAX_ENTRIES:])
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({"version": _VERSION, "entries": newest}), encoding="utf-8")
        partial.replace(path)  # at once, for processes that read meanwhile
    except OSError:
        return  # a cache that cannot be written costs another measurement next time, nothing else


def _read(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = content["entries"] if content["version"] == _VERSION else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # none yet, not readable, or not ours
        return {}
    return entries if isinstance(entries, dict) else {}
