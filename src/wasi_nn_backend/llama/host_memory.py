"""How much memory this machine can still give, asked before llama.cpp takes it.

Linux hands out more than it has and kills the process when the pages are touched, which llama.cpp does at once for a KV
cache: an allocation that looks fine would end the program instead of returning an error.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["available_bytes"]

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = _CGROUP) -> int | None:
    """Bytes that can be used without swapping, or None where the system does not tell.

    The least of the machine's ``MemAvailable`` and what the control group (a container's limit) leaves.
    """
    limits = [limit for limit in (_from_meminfo(meminfo), _from_cgroup(cgroup), _from_sysconf()) if limit is not None]
    return min(limits, default=None)


def _from_meminfo(meminfo: Path) -> int | None:
    try:
        for line in meminfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


def _from_cgroup(cgroup: Path) -> int | None:
    """Version 2 only: memory.current counts the page cache, too, which the kernel gives back: add it again."""
    try:
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        statistics = dict(line.split(maxsplit=1) for line in (cgroup / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(statistics.get("inactive_file", "0")))
    except (OSError, ValueError):  # no such files, or "max": no limit
        return None


def _from_sysconf() -> int | None:
    """The whole of the machine's memory: all that macOS tells without another library."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
