"""How much memory is free, on systems that tell it in their own ways or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from wasi_nn_backend.llama.host_memory import available_bytes

KIB = 1024


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal:  9000 kB\nMemFree:  100 kB\nMemAvailable:  5000 kB\n")
    return path


def test_of_the_machine(tmp_path: Path, meminfo: Path) -> None:
    assert available_bytes(meminfo, tmp_path / "none") == 5000 * KIB


def test_of_a_container_with_a_limit(tmp_path: Path, meminfo: Path) -> None:
    (tmp_path / "memory.max").write_text(f"{3000 * KIB}\n")
    (tmp_path / "memory.current").write_text(f"{2000 * KIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon 7\ninactive_file {500 * KIB}\n")
    assert available_bytes(meminfo, tmp_path) == 1500 * KIB
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, tmp_path) == 5000 * KIB


def test_of_a_system_that_tells_its_size_only(tmp_path: Path, meminfo: Path) -> None:
    whole = available_bytes(tmp_path / "none", tmp_path / "none")
    assert whole is None or whole > 5000 * KIB
    meminfo.write_text("MemAvailable: plenty\n")
    assert available_bytes(meminfo, tmp_path / "none") == whole


def test_of_this_machine() -> None:
    n_bytes = available_bytes()
    assert n_bytes is None or n_bytes > 0
