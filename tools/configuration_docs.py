"""Write the tables of keys in docs/configuration.md anew, out of the configuration's own models."""

from __future__ import annotations

import re
from pathlib import Path

from wasi_nn_backend.config.reference import markdown_table

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "configuration.md"

#: A table stands between two comments that no reader sees: ``<!-- keys: model -->`` and ``<!-- end -->``.
_TABLE = re.compile(r"(<!-- keys: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def with_tables(text: str) -> str:
    """The document with every table as it has to be."""
    return _TABLE.sub(lambda match: f"{match[1]}\n{markdown_table(match[2])}\n{match[3]}", text)


def documented_sections(text: str) -> list[str]:
    return [match[2] for match in _TABLE.finditer(text)]


def main() -> None:
    before = DOCUMENT.read_text(encoding="utf-8")
    after = with_tables(before)
    DOCUMENT.write_text(after, encoding="utf-8")
    print(f"{DOCUMENT}: {'changed' if after != before else 'as it was'}")


if __name__ == "__main__":
    main()
