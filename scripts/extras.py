"""What the extras of pyproject.toml bring, a line each: `make setup` installs an engine before there is a wheel.

python scripts/extras.py train cpu
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib  # type: ignore[no-redef]

ROOT = Path(__file__).resolve().parent.parent


def requirements(*extras: str) -> list[str]:
    """Each once, in the order of the extras. Raises KeyError for an extra that there is not."""
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return list(dict.fromkeys(line for extra in extras for line in project["optional-dependencies"][extra]))


if __name__ == "__main__":
    print("\n".join(requirements(*sys.argv[1:])))
