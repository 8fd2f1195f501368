"""The house in numbers: files that can be read in one go, a step whose parts can be counted."""

from __future__ import annotations

import ast
import subprocess
from collections import Counter

import pytest

from testing import ROOT

LONGEST = 400  # lines


@pytest.fixture(scope="module")
def sources():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    endings = (".py", ".h", ".cuh", ".cpp", ".cu")
    return [path for name in listed.stdout.splitlines() if (path := ROOT / name).suffix in endings and path.exists()]


def test_no_file_is_longer_than_a_reader_holds(sources):
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_each_test_file_has_a_name_of_its_own(sources):
    """The folders of tests are no packages: pytest imports two files of one name as one module."""
    names = Counter(path.name for path in sources if path.is_relative_to(ROOT / "tests") and path.name[:5] == "test_")
    assert [name for name, count in names.items() if count > 1] == []


def test_the_step_stands_on_few_modules():
    tree = ast.parse((ROOT / "python/longgrpo/train/loop.py").read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert len([module for module in modules if module and module.startswith("longgrpo")]) <= 15
