"""Where longgrpo keeps what it need not make twice."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """LONGGRPO_CACHE, or ~/.cache/longgrpo; it may not exist yet."""
    return Path(os.environ.get("LONGGRPO_CACHE", "~/.cache/longgrpo")).expanduser()
