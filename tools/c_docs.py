"""Write docs/reference/c.md anew, out of the comments of the C header."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADER = ROOT / "src" / "wasi_nn_backend" / "capi" / "include" / "wasi_nn_llama.h"
DOCUMENT = ROOT / "docs" / "reference" / "c.md"

TITLE = """# C interface

<!-- Written by tools/c_docs.py out of include/wasi_nn_llama.h: change the header, not this page. -->
"""
#: A comment that begins a line, and the declarations up to the next one.
_BLOCK = re.compile(r"^/\*(.*?)\*/\n(.*?)(?=^/\*|\Z)", re.MULTILINE | re.DOTALL)
_FUNCTION = re.compile(r"(\w+)\s*\(")
_NOT_SHOWN = re.compile(r"^(#ifndef WASI_NN_LLAMA_H|#define WASI_NN_LLAMA_H|#include.*|#endif /\* WASI_NN_LLAMA_H.*)$")


def c_markdown() -> str:
    parts = [TITLE]
    for comment, code in _BLOCK.findall(HEADER.read_text(encoding="utf-8")):
        parts += _section(_text(comment), _declarations(code))
    return "\n".join(parts).rstrip() + "\n"


def _section(text: str, code: str) -> Iterator[str]:
    functions = [] if code.lstrip().startswith(("#", "typedef", "enum")) else _FUNCTION.findall(code)
    if functions:
        yield f"## {', '.join(f'`{name}`' for name in dict.fromkeys(functions))}\n"
    yield text + "\n"
    if code:
        yield f"```c\n{code}\n```\n"


def _text(comment: str) -> str:
    lines = [re.sub(r"^ ?\* ?", "", line.rstrip()) for line in comment.strip().splitlines()]
    # What is indented, names with their meaning, keeps its form.
    out: list[str] = []
    for line in lines:
        out.append(f"    {line}" if line.startswith("  ") else line)
    return "\n".join(out)


def _declarations(code: str) -> str:
    lines = [line for line in code.strip("\n").splitlines() if not _NOT_SHOWN.match(line)]
    text = "\n".join(lines).strip()
    return (
        "" if set(re.findall(r"\S+", text)) <= {"#ifdef", "__cplusplus", "extern", '"C"', "{", "}", "#endif"} else text
    )


def main() -> None:
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(c_markdown(), encoding="utf-8")
    print(f"{DOCUMENT}: written")


if __name__ == "__main__":
    main()
