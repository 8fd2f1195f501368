"""Writes the tables of docs/from-trl.md from longgrpo/config/from_trl.tsv: python scripts/trl_docs.py"""

from __future__ import annotations

from pathlib import Path

from longgrpo.config.from_trl import Row, sections

PAGE = Path(__file__).parents[1] / "docs" / "from-trl.md"
MARK = "<!-- From here on python scripts/trl_docs.py writes this page, of python/longgrpo/config/from_trl.tsv. -->\n"


def render(page: str) -> str:
    """The page with its tables as they are now."""
    head, mark, _ = page.partition(MARK)
    assert mark, f"{PAGE}: has no line {MARK!r}"
    tables = []
    for title, rows in sections().items():
        tables += [f"\n## {title}\n\n| TRL | here | |\n|---|---|---|\n", *map(_row, rows)]
    return head + mark + "".join(tables)


def _row(row: Row) -> str:
    here = row.here if row.here in ("none", "always") else _code(row.here.split(", "))
    return f"| {_code(row.theirs)} | {here} |{f' {row.note}' if row.note else ''} |\n"


def _code(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
