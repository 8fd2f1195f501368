"""A hook of mkdocs: a link from docs/ to a file of the source tree, which the site has not, becomes the file's name."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[([^\]]*)\]\((\.\./[^)#]+)(?:#[^)]*)?\)")


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
