"""Changing another library's behavior for a while, and only in versions that were tested."""

from __future__ import annotations

from types import ModuleType
from typing import Any


def require_version(library: ModuleType, tested: tuple[str, ...]) -> None:
    """Raises RuntimeError if `library` is of another version than those `tested`."""
    if library.__version__ not in tested:
        raise RuntimeError(
            f"longgrpo.integrations.{library.__name__} was tested with {library.__name__} {', '.join(tested)} and not "
            f"with {library.__version__}: pip install {library.__name__}=={tested[-1]}"
        )


class Patch:
    """Attributes of `owner` (a module or class) with other values, until `undo()` or the end of a with-block.

    Raises RuntimeError in `undo()` if other code has changed one of them meanwhile: undoing would drop that
    change, which has to be undone first.
    """

    def __init__(self, owner: Any, **values: Any) -> None:
        self._owner, self._values = owner, values
        self._before = {name: getattr(owner, name) for name in values}
        self._set(values)

    def undo(self) -> None:
        """Puts back what was there; a second call does nothing."""
        if not self._before:
            return
        changed = [name for name, value in self._values.items() if getattr(self._owner, name) is not value]
        if changed:
            raise RuntimeError(f"{self._owner.__name__}.{changed[0]} was patched again: undo that patch first")
        self._set(self._before)
        self._before = {}

    def _set(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self._owner, name, value)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()
