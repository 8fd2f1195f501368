"""Tests that share what costs seconds to make (an engine, a compiled module) run in one process: `pytest -n` deals out
whole folders."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.xdist_group(str(item.path.parent.relative_to(HERE))))
