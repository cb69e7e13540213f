"""Hooks of the site's build (mkdocs.yml): links that lead out of docs/, and docstrings as they are written here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The site has the pages of docs/ only: a link to any other file of the project becomes the file's name.

    Raises ``PluginError``, which ends the build, where there is no such file.
    """
    folder = Path(page.file.abs_src_path).parent

    def replace(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if target.is_relative_to(ROOT / "docs"):
            return match[0]  # mkdocs checks these itself
        if not target.exists() or not target.is_relative_to(ROOT):
            raise PluginError(f"{page.file.src_path}: the link to {match[2]} leads nowhere")
        name = target.relative_to(ROOT).as_posix()
        return f"`{name}`" if match[1].strip("`") in (name, target.name) else f"{match[1]} (`{name}`)"

    return _LINK.sub(replace, markdown)
