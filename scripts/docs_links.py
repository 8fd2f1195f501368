"""Hooks of mkdocs: CONTRIBUTING.md becomes a page; a link to a file that the site has not becomes its name."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[([^\]]*)\]\((\.\./[^)#]+)(?:#[^)]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """CONTRIBUTING.md lies beside the README, as git hosts expect; its links are those of a page in docs/ here."""
    text = re.sub(r"\]\((?!\w+:|#)([^)]+)\)", r"](../\1)", (ROOT / "CONTRIBUTING.md").read_text())
    files.append(File.generated(config, "contributing.md", content=text.replace("](../docs/", "](")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Raises FileNotFoundError for a link to a file that is not there."""

    def named(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), target))
        if path.startswith("docs/"):
            return match[0]
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"docs/{page.file.src_uri}: {match[0]} leads nowhere")
        return text if path in text else f"{text} (`{path}`)"

    return LINK.sub(named, markdown)
