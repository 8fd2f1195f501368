"""Text that others wrote (a model, a tool, a data set, a library), as it may be shown.

Characters that cannot be seen, that steer a terminal or that turn the reading direction are shown as signs: they can
hide an instruction, or make a line read as another. Everything that reaches a terminal, a log or a report passes here.
"""

from __future__ import annotations

import os
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Invisible, and in a category of what can be seen: fillers, variation selectors, an accent of no letter, blank Braille.
_FILLERS = (0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0)
_BLANK = {*_FILLERS, *range(0x180B, 0x180E), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}
# Control, format (soft hyphens, joiners, tags, direction), surrogate, and separators of lines other than \n.
_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")


class _Signs(dict[int, str]):
    """A character's code -> what is shown in its place."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        hidden = character not in "\n\t" and (unicodedata.category(character) in _CATEGORIES or code in _BLANK)
        if code < 0x20 and hidden:
            sign = chr(0x2400 + code)
        elif code == 0x7F:
            sign = "\u2421"
        else:
            sign = f"\u27e8U+{code:04X}\u27e9" if hidden else character
        self[code] = sign
        return sign


_SIGNS = _Signs()


def visible(text: str) -> str:
    """The text with signs in place of what cannot be seen: \u241b, \u27e8U+200B\u27e9. Line ends and tabs stay."""
    return text.translate(_SIGNS)


@contextmanager
def listening() -> Iterator[None]:
    """Once nobody reads the terminal any more (`| head` has ended, a connection is closed), nothing goes there."""
    try:
        yield
    except (OSError, ValueError):  # ValueError: it was closed in this process
        with suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stderr.fileno())
