"""Write docs/reference/cli.md anew, out of the commands themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from wasi_nn_backend.cli.app import app

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "reference" / "cli.md"

HEAD = """# Command line

<!-- Written by tools/cli_docs.py out of the commands: change them, not this page. -->

`wasi-nn [OPTIONS] COMMAND [ARGUMENTS]`. Results go to standard output, logs and progress to standard error.
"""
_BOLD = re.compile(r"\[bold\](.*?)\[/(?:bold)?\]", re.DOTALL)
#: Lines of a list that has to be shown as it is.
_INDENTED = re.compile(r"^( {2,}|\s*\d+  )", re.MULTILINE)


def cli_markdown() -> str:
    group = typer.main.get_command(app)
    parts = [HEAD, *_section(group, "Global options")]
    for name, command in group.commands.items():  # type: ignore[attr-defined]  # a group: typer's types do not say so
        parts += _section(command, f"wasi-nn {name}")
    return "\n".join(parts).rstrip() + "\n"


def _section(command: Any, title: str) -> Iterator[str]:
    yield f"## {title}\n"
    if title.startswith("wasi-nn"):
        yield f"```text\n{title} {' '.join(_usage(command))}\n```\n"
    for paragraph in (command.help or "").split("\n\n"):
        yield _paragraph(paragraph) + "\n"
    rows = [row for parameter in command.params if (row := _row(parameter)) is not None]
    if rows:
        yield "| option | default | |\n| --- | --- | --- |"
        yield "\n".join(rows) + "\n"


def _paragraph(text: str) -> str:
    text = text.replace("\b", "").strip("\n")
    if (_INDENTED.search(text) and "\n" in text) or re.match(r"\s*\d+  ", text):
        return f"```text\n{text}\n```"
    return _BOLD.sub(lambda match: f"`{' '.join(match[1].split())}`", text)


def _usage(command: Any) -> Iterator[str]:
    yield "[OPTIONS]"
    for parameter in command.params:
        if not _is_option(parameter):
            yield _metavar(parameter)


def _is_option(parameter: Any) -> bool:
    return bool(parameter.opts[0].startswith("-"))


def _metavar(parameter: Any) -> str:
    if parameter.metavar:
        return str(parameter.metavar)
    name = str(parameter.name).upper() + ("..." if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _row(parameter: Any) -> str | None:
    if getattr(parameter, "hidden", False):
        return None
    if _is_option(parameter):
        is_flag = getattr(parameter, "is_flag", False)
        value = "" if is_flag else f" {parameter.metavar or parameter.name.upper()}"
        name = ", ".join([*parameter.opts, *parameter.secondary_opts]) + value
    else:
        name = _metavar(parameter)
    return f"| `{_cell(name)}` | {_default(parameter)} | {_cell(parameter.help or '')} |"


def _default(parameter: Any) -> str:
    shown = getattr(parameter, "show_default", None)
    if isinstance(shown, str):
        return _cell(shown)
    if parameter.required:
        return "required"
    default = parameter.default
    if default in (None, False, ()) or callable(default) or shown is False:
        return ""
    return f"`{_cell(str(getattr(default, 'value', default)))}`"


def _cell(text: str) -> str:
    return " ".join(_BOLD.sub(r"`\1`", text).split()).replace("|", "\\|")


def main() -> None:
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(cli_markdown(), encoding="utf-8")
    print(f"{DOCUMENT}: written")


if __name__ == "__main__":
    main()
