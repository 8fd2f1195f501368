"""What TRL's and PEFT's options are called here: from_trl.tsv, of which docs/from-trl.md is made and unknown keys are
answered."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("from_trl.tsv")
"""A row: their names, ours (or "none", or "always"), a note. A line that begins with # is a section's title."""


class Row(NamedTuple):
    theirs: tuple[str, ...]
    here: str
    note: str


@lru_cache
def sections() -> dict[str, list[Row]]:
    """The rows by the titles of their sections."""
    found: dict[str, list[Row]] = {}
    for line in TABLE.read_text("utf-8").splitlines():
        if line.startswith("# "):
            rows = found[line.removeprefix("# ")] = []
        else:
            theirs, here, note = line.split("\t")
            rows.append(Row(tuple(theirs.split(", ")), here, note))
    return found


def answer(name: str) -> str | None:
    """What to say of a key that is theirs; None if it is not."""
    for title, rows in sections().items():
        for row in rows:
            if name in row.theirs:
                owner = "PEFT" if "PEFT" in title else "TRL"
                return f"{owner}'s {name} {_here(row)}"
    return None


def _here(row: Row) -> str:
    note = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", row.note).replace("`", "")
    if row.here == "none":
        return f"has no counterpart: {note}"
    if row.here == "always":
        return f"needs no key: {note}"
    return f"is {row.here} here" + (f" ({note})" if note else "")
