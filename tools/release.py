"""Build sdist and wheel, check both, and install the wheel into an environment of its own: what a release has to pass.

    python tools/release.py            # the steps, nothing is uploaded
    python tools/release.py --keep DIR # also keeps the environment that the wheel was installed into

Needs the extra ``release`` (build and twine) and a compiler. The wheel of llama.cpp that `make setup` compiled and kept
is used; without it pip compiles one, which takes 4 to 10 minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
QUESTION = "Name the capital city of France."
#: What a wheel has to carry beside the modules.
IN_WHEEL = (
    r"wasi_nn_backend/py\.typed",
    r"wasi_nn_backend/capi/include/wasi_nn_llama\.h",
    r"wasi_nn_backend-[^/]+\.data/data/share/wasi-nn-backend/examples/c/ask\.wasm",
    r"wasi_nn_backend-[^/]+\.dist-info/licenses/LICENSE",
)
IN_SDIST = (r"[^/]+/CHANGELOG\.md", r"[^/]+/tests/conftest\.py", r"[^/]+/Makefile", r"[^/]+/src/.*/py\.typed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="make the environment there and leave it")
    arguments = parser.parse_args()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    check_changelog(version)
    wheel, sdist = build(version)
    check_contents(wheel, zipfile.ZipFile(wheel).namelist(), IN_WHEEL)
    with tarfile.open(sdist) as archive:
        check_contents(sdist, archive.getnames(), IN_SDIST)
    run([sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)])
    with environment(arguments.keep) as folder:
        try_out(folder, wheel, version)
    say(f"{wheel.name} and {sdist.name} are good; upload them with: twine upload {DIST}/*")
    return 0


def check_changelog(version: str) -> None:
    """The version of pyproject.toml, the only one that is written down, has to be in the changelog."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"\b{re.escape(version)}\b", text):
        fail(f"CHANGELOG.md does not mention {version}; write down what changed")


def build(version: str) -> tuple[Path, Path]:
    shutil.rmtree(DIST, ignore_errors=True)
    say("building sdist and, from it, the wheel")
    run([sys.executable, "-m", "build", "--outdir", str(DIST), str(ROOT)])
    wheels, sdists = sorted(DIST.glob("*.whl")), sorted(DIST.glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1 or f"-{version}-" not in wheels[0].name:
        fail(f"expected one wheel and one sdist of {version} in {DIST}, found {[*wheels, *sdists]}")
    return wheels[0], sdists[0]


def check_contents(archive: Path, names: Sequence[str], patterns: Sequence[str]) -> None:
    missing = [pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in names)]
    if missing:
        fail(f"{archive.name} lacks {', '.join(missing)}")
    unwanted = [name for name in names if re.search(r"(__pycache__|node_modules|\.gguf$|/\.venv)", name)]
    if unwanted:
        fail(f"{archive.name} has what does not belong into it: {', '.join(unwanted[:5])}")


@contextlib.contextmanager
def environment(keep: Path | None) -> Iterator[Path]:
    with contextlib.ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wasi-nn-release-")))
        say(f"installing the wheel into {folder}")
        run([sys.executable, "-m", "venv", "--clear", str(folder)])
        yield folder


def try_out(folder: Path, wheel: Path, version: str) -> None:
    """A smoke run outside of the source tree: the command line, a guest, the C library, the doctor."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wasi-nn-backend" / "wheels"
    links = [f"--find-links={path}" for path in sorted({path.parent for path in cache.rglob("llama_cpp_python-*.whl")})]
    python, wasi_nn = str(folder / "bin" / "python"), str(folder / "bin" / "wasi-nn")
    run([python, "-m", "pip", "--disable-pip-version-check", "install", "-q", *links, f"{wheel}[demo]"])
    if version not in run([wasi_nn, "--version"], folder):
        fail(f"wasi-nn --version does not say {version}")
    say(run([wasi_nn, "doctor"], folder))
    examples = folder / "share" / "wasi-nn-backend" / "examples"
    ask = [wasi_nn, "run", "--nn-graph", "default=smollm2,prompt_mode=chat,temperature=0"]
    expect_answer(run([*ask, str(examples / "c" / "ask.wasm"), "default", QUESTION], folder))
    flags = run([wasi_nn, "capi", "--cflags", "--libs"], folder).split()
    run(["cc", str(examples / "c" / "native" / "ask.c"), "-o", str(folder / "ask"), *flags])
    expect_answer(run([str(folder / "ask"), "smollm2", QUESTION], folder))


def expect_answer(text: str) -> None:
    if "Paris" not in text:
        fail(f"the installed program answered {text!r}; Paris was expected")
    say(text)


def run(command: Sequence[str], cwd: Path | None = None) -> str:
    """Standard output; a command that fails ends the script with its output above."""
    environ = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=environ, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.stderr.write(done.stdout)
        fail(f"{' '.join(command)} ended with {done.returncode}")
    return done.stdout.strip()


def say(text: str) -> None:
    print(text, flush=True)


def fail(reason: str) -> None:
    raise SystemExit(f"release: {reason}")


if __name__ == "__main__":
    sys.exit(main())
