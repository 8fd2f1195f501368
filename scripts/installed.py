"""Which longgrpo Python imports, and whether it is this tree's: a test of an older build proves nothing.

    python scripts/installed.py     one line; the exit status is 1 for a build that is not of this tree

Sources are compared by content, so that a git checkout does not make a build old.
"""

from __future__ import annotations

import hashlib
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MANIFEST = "_sources.sha256"
"""Lies beside the libraries and says what they are built of; csrc/manifest.cmake writes it."""


def imported() -> Path | None:
    """The folder of the package that Python finds; nothing of it is run."""
    spec = find_spec("longgrpo")
    return Path(spec.origin).resolve().parent if spec and spec.origin else None


def problem(package: Path | None, root: Path = ROOT) -> str | None:
    """Why tests of `root` would not test its files when Python imports `package`, and what helps; None: they would."""
    if package is None:
        return "longgrpo is not installed: run make dev (editable), or make setup (the wheel)"
    source = root / "python" / "longgrpo"
    editable = package == source.resolve()
    remedy = "run make dev" if editable else "run make dev (editable), or make setup (the wheel)"
    if not editable and (differing := _differing(package, source)):
        return f"longgrpo is imported from {package}, which differs from this tree in {_named(differing)}: {remedy}"
    if not (package / "_cpu.so").is_file():
        return f"{package} has no compiled part: {remedy}"
    if not (package / MANIFEST).is_file():
        return f"nothing says what {package / '_cpu.so'} was built of ({MANIFEST} is missing): {remedy}"
    if changed := _changed((package / MANIFEST).read_text(), root):
        return f"the compiled part in {package} is older than {_named(changed)}: {remedy}"
    return None


def _changed(manifest: str, root: Path) -> list[str]:
    """The files of a manifest that are others in `root`. A new file needs no entry: an old one must name it."""
    entries = (line.split(maxsplit=1) for line in manifest.splitlines())
    return [name for digest, name in entries if _digest(root / name) != digest]


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _differing(package: Path, source: Path) -> list[str]:
    def files(folder: Path) -> set[Path]:
        kinds = (".py", ".css", ".html", ".js")
        return {path.relative_to(folder) for path in folder.rglob("*") if path.suffix in kinds}

    names = sorted(files(package) | files(source))
    return [f"python/longgrpo/{name}" for name in names if _digest(package / name) != _digest(source / name)]


def _named(files: list[str]) -> str:
    return files[0] + f" and {len(files) - 1} more" * (len(files) > 1)


if __name__ == "__main__":
    sys.path.pop(0)  # this script's folder
    package = imported()
    if reason := problem(package):
        sys.exit(f"longgrpo: {reason}")
    kind = "editable" if package == ROOT / "python" / "longgrpo" else "wheel"
    print(f"longgrpo: the {kind} is installed in {sys.prefix}, built of this tree")
