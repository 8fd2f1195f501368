"""Nothing imports an integration, and an integration imports the loss, offload and a model's head only."""

from __future__ import annotations

import ast
from pathlib import Path

import longgrpo

PACKAGE = Path(longgrpo.__file__).parent


def imports(path: Path) -> set[str]:
    """Modules of longgrpo that a file imports, at any depth of it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "longgrpo"}


def test_nothing_imports_an_integration():
    for path in PACKAGE.rglob("*.py"):
        if "integrations" not in path.parts:
            assert not {name for name in imports(path) if name.startswith("longgrpo.integrations")}, path


def test_integrations_import_the_loss_offload_and_a_models_head_only():
    files = list((PACKAGE / "integrations").glob("*.py"))
    assert len(files) >= 4
    for path in files:
        others = {name for name in imports(path) if not name.startswith("longgrpo.model.head.")}
        layers = {name.split(".")[1] for name in others}
        assert layers <= {"loss", "offload", "integrations"}, (path, layers)
