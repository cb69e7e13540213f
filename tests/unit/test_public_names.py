"""Guards the public surface: that a name appears, disappears or loses its description is decided, not an accident."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

import wasi_nn_backend
from wasi_nn_backend import errors

PROJECT = Path(__file__).resolve().parents[2]

#: A change here is a change for users: it belongs in CHANGELOG.md too.
PUBLIC_NAMES = [
    "AsyncBackend",
    "AsyncExecutionContext",
    "AsyncGraph",
    "Backend",
    "Busy",
    "Cancelled",
    "ContextFull",
    "DeadlineExceeded",
    "Door",
    "EndOfSequence",
    "ErrorCode",
    "ExecutionContext",
    "ExecutionTarget",
    "Graph",
    "GraphEncoding",
    "InvalidArgument",
    "InvalidEncoding",
    "Message",
    "MissingMemory",
    "ModelNotFound",
    "NotFound",
    "PromptTooLong",
    "RuntimeFailure",
    "SecurityViolation",
    "Tensor",
    "TensorType",
    "TooLarge",
    "UnsupportedOperation",
    "WasiNNError",
    "__version__",
]
#: What callers may rely on, in the order in which they call it.
METHODS = {
    "Backend": ["register", "load", "load_by_name", "load_by_name_with_config", "reload", "status", "close"],
    "Graph": ["alive", "model", "init_execution_context", "embed", "reload", "unload"],
    "ExecutionContext": [
        "set_input",
        "compute",
        "get_output",
        "compute_single",
        "get_output_single",
        "fini_single",
        "run_inference",
        "stream",
        "cancel",
        "messages",
        "reset",
        "metadata",
        "close",
    ],
}
CLASSES = [name for name in PUBLIC_NAMES if not name.startswith("__")]


def is_described(name: str) -> bool:
    """Whether a class has a docstring of its own, or its line in the tree of errors (an inherited one says nothing)."""
    subject = getattr(wasi_nn_backend, name)
    in_tree = re.search(rf"[├└]── {name} +\S", errors.__doc__ or "")
    return bool(vars(subject).get("__doc__")) or in_tree is not None


def python_examples(markdown: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)


def test_the_list_is_the_one_agreed() -> None:
    assert sorted(wasi_nn_backend.__all__) == sorted(PUBLIC_NAMES)


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_every_name_can_be_imported(name: str) -> None:
    namespace: dict[str, object] = {}
    exec(f"from wasi_nn_backend import {name}", namespace)
    assert namespace[name] is not None


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_described(name: str) -> None:
    assert is_described(name), f"{name} needs a docstring of its own, or its line in the tree on top of errors.py"


@pytest.mark.parametrize(("name", "method"), [(name, method) for name in METHODS for method in METHODS[name]])
def test_every_method_of_the_contract_is_described(name: str, method: str) -> None:
    assert getattr(getattr(wasi_nn_backend, name), method).__doc__, f"{name}.{method} needs a docstring"


def test_every_error_is_public() -> None:
    assert set(errors.__all__) <= set(PUBLIC_NAMES)


def test_the_version_is_kept_in_one_place() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert wasi_nn_backend.__version__ == project["version"]


def test_examples_use_public_names_only() -> None:
    examples = python_examples((PROJECT / "README.md").read_text(encoding="utf-8"))
    imported = [
        alias.name
        for example in examples
        for node in ast.walk(ast.parse(example))
        if isinstance(node, ast.ImportFrom) and node.module == "wasi_nn_backend"
        for alias in node.names
    ]
    assert imported
    assert set(imported) <= set(PUBLIC_NAMES)
