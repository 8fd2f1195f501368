"""The Python in the README and the docs runs as printed. A fragment, which cannot, is marked py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [
    pytest.param(code, id=f"{page.name}: {code.splitlines()[0]}")
    for page in PAGES
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
]


@pytest.mark.parametrize("code", BLOCKS)
def test_block_runs(code, tmp_path):
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path, timeout=120)


def test_there_are_blocks():
    assert len(BLOCKS) >= 2
