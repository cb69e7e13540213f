"""What ``inspect`` says about each kind of file: the same facts as rows for people and as values for JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wasi_nn_backend.cli.component_file import component_imports
from wasi_nn_backend.cli.terminal import format_bytes, format_count

__all__ = ["Report", "component_report", "gguf_report", "module_report"]

_WASI_NN_MODULES = ("wasi_ephemeral_nn", "wasi_nn")
_TEMPLATE_CHARS_SHOWN = 100


@dataclass(frozen=True, slots=True)
class Report:
    """``values`` is what ``--json`` prints; ``rows`` are labels with lines of text; ``lacking`` names what a module
    needs and this host has not. Labels are at most 15 characters long."""

    values: Mapping[str, Any]
    rows: Sequence[tuple[str, Sequence[str]]]
    lacking: Sequence[str] = ()


def module_report(file: Path) -> Report:
    """Raises ``InvalidArgument`` for a module that does not compile."""
    from wasi_nn_backend.host.linker import examine_imports
    from wasi_nn_backend.host.modules import compile_module, create_engine, read_module

    engine = create_engine()
    module = compile_module(engine, read_module(file))
    found = examine_imports(module, engine)
    wasi_nn = [_signature(item) for item in module.imports if item.module in _WASI_NN_MODULES]
    others = Counter(item.module for item in module.imports if item.module not in _WASI_NN_MODULES)
    memories = [_memory(item) for item in _imports_and_exports(module) if _is_memory(item)]
    exports = [item.name for item in module.exports if not _is_memory(item)]
    dialect = found.dialect.name if found.dialect is not None else None
    lacking = [str(item) for item in found.missing]
    return Report(
        values={
            "file": str(file),
            "kind": "module",
            "n_bytes": file.stat().st_size,
            "dialect": dialect,
            "wasi_nn_imports": wasi_nn,
            "other_imports": dict(others),
            "memories": memories,
            "exports": exports,
            "is_command": "_start" in exports,
            "lacking": lacking,
        },
        rows=[
            ("File", [f"{file} ({format_bytes(file.stat().st_size)}), a WebAssembly module"]),
            ("Dialect", [dialect or "none: the module imports no WASI-NN"]),
            ("WASI-NN imports", wasi_nn),
            ("Other imports", [f"{name} ({n} imports)" for name, n in others.items()]),
            ("Memories", [_describe_memory(memory) for memory in memories]),
            ("Exports", [", ".join(exports)] if exports else []),
            ("Lacking here", lacking or ["nothing: this host can run it"]),
        ],
        lacking=lacking,
    )


# wasmtime's own types are told apart by what they have: their classes are for host/ alone.


def _imports_and_exports(module: Any) -> list[Any]:
    return [*module.imports, *module.exports]


def _is_memory(item: Any) -> bool:
    return hasattr(item.type, "page_size")


def _signature(item: Any) -> str:
    """``load_by_name (i32, i32, i32) -> i32``."""
    if not hasattr(item.type, "params"):
        return f"{item.name}: not a function"
    parameters = ", ".join(map(str, item.type.params))
    return f"{item.name} ({parameters}) -> {', '.join(map(str, item.type.results)) or 'nothing'}"


def _memory(item: Any) -> dict[str, Any]:
    limits, page_bytes = item.type.limits, item.type.page_size
    return {
        "name": item.name,
        "imported_from": getattr(item, "module", None),
        "is_64_bit": item.type.is_64,
        "is_shared": item.type.is_shared,
        "min_bytes": limits.min * page_bytes,
        "max_bytes": None if limits.max is None else limits.max * page_bytes,
    }


def _describe_memory(memory: Mapping[str, Any]) -> str:
    source = f"imported from {memory['imported_from']}" if memory["imported_from"] else "exported"
    width = "64-bit" if memory["is_64_bit"] else "32-bit"
    shared = ", shared" if memory["is_shared"] else ""
    most = "" if memory["max_bytes"] is None else f", {format_bytes(memory['max_bytes'])} at most"
    return f"{memory['name']}: {source}, {width}{shared}, {format_bytes(memory['min_bytes'])} at the start{most}"


def component_report(file: Path) -> Report:
    """Raises ``InvalidArgument`` for a component that is cut short."""
    from wasi_nn_backend.host import read_binary
    from wasi_nn_backend.host.component_imports import missing_interface

    imports = component_imports(read_binary(file))
    wasi_nn = [name for name in imports if name.startswith("wasi:nn/")]
    others = [name for name in imports if not name.startswith("wasi:nn/")]
    lacking = [str(missing) for name in imports if (missing := missing_interface(name)) is not None]
    n_bytes = file.stat().st_size
    return Report(
        values={
            "file": str(file),
            "kind": "component",
            "n_bytes": n_bytes,
            "wasi_nn_imports": wasi_nn,
            "other_imports": others,
            "lacking": lacking,
        },
        rows=[
            ("File", [f"{file} ({format_bytes(n_bytes)}), a WebAssembly component"]),
            ("WASI-NN imports", wasi_nn),
            ("Other imports", others),
            ("Lacking here", lacking or ["nothing: this host has all these interfaces"]),
        ],
        lacking=lacking,
    )


def gguf_report(file: Path) -> Report:
    """Raises ``InvalidArgument`` for a file that is damaged or holds no language model."""
    from wasi_nn_backend.llama.gguf_file import read_gguf_summary
    from wasi_nn_backend.llama.kv_shape import cache_type

    summary = read_gguf_summary(file)
    kv_type = cache_type("f16", "the cache")
    kv_bytes = 0 if summary.is_encoder else summary.kv_shape.bytes_per_token(kv_type, kv_type)
    quantisation = summary.file_type.removeprefix("MOSTLY_").removeprefix("ALL_")
    template = summary.chat_template
    chat = _first_line(template) if template else "none: a chat is written in the ChatML format"
    parts = f", the first of {summary.n_splits} parts" if summary.n_splits > 1 else ""
    return Report(
        values={
            "file": str(file),
            "kind": "gguf",
            "n_bytes": summary.n_file_bytes,
            "n_splits": summary.n_splits,
            "name": summary.name,
            "architecture": summary.architecture,
            "quantisation": quantisation,
            "n_params": summary.n_params,
            "n_layers": summary.n_layers,
            "n_ctx_train": summary.n_ctx_train,
            "n_vocab": summary.n_vocab,
            "tokenizer": summary.tokenizer,
            "is_encoder": summary.is_encoder,
            "kv_bytes_per_token": kv_bytes,
            "chat_template": template,
        },
        rows=[
            ("File", [f"{file} ({format_bytes(summary.n_file_bytes)}), a GGUF model{parts}"]),
            ("Name", [summary.name or "not given"]),
            ("Architecture", [f"{summary.architecture}, {summary.n_layers} layers"]),
            ("Parameters", [format_count(summary.n_params)]),
            ("Quantisation", [quantisation]),
            ("Context", [f"{summary.n_ctx_train:,} tokens in training"]),
            ("Vocabulary", [f"{summary.n_vocab:,} tokens ({summary.tokenizer})"]),
            *(
                [("Gives", ["embeddings, no text"])]
                if summary.is_encoder
                else [("KV memory", [f"{format_bytes(kv_bytes)} a token (f16)"]), ("Chat template", [chat])]
            ),
        ],
    )


def _first_line(template: str) -> str:
    lines = template.strip().splitlines() or [""]
    line = lines[0] if len(lines[0]) <= _TEMPLATE_CHARS_SHOWN else lines[0][:_TEMPLATE_CHARS_SHOWN] + "..."
    return f"{line} ({len(template):,} characters)"
