"""Where rows come from: files, data sets on disk or on the hub, tasks of reasoning_gym, functions, streams."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from longgrpo.config.task import TaskConfig
from longgrpo.errors import DataError
from longgrpo.tasks.chat import Unfilled, unfilled
from longgrpo.tasks.user_code import load_function

Row = Mapping[str, Any]
DEFAULT_SIZE = 100_000  # problems of a reasoning_gym task, which makes each when it is asked for
ENDLESS = sys.maxsize  # the length of a stream whose end has not been seen


class Rows(Protocol):
    """A sequence of mappings; row i is always the same. A list, a datasets.Dataset, a reasoning_gym task."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Streamed:
    """Rows that can only be read one after the other, as a sequence: to read an earlier one begins again. After the
    last row comes the first. open: begins a reading.

    Raises DataError if there are no rows, or no more when they are read again.
    """

    def __init__(self, open: Callable[[], Iterable[Row]]) -> None:
        self._open, self._length = open, ENDLESS
        self._begin()

    def _begin(self) -> None:
        self._rows: Iterator[Row] = iter(self._open())
        self._read = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        if index < self._read - 1:
            self._begin()
        while self._read <= index:
            try:
                self._last = next(self._rows)
            except StopIteration:
                break
            self._read += 1
        if self._read > index:
            return self._last
        if self._read == 0:
            raise DataError(
                "the stream of rows is empty, or was read before and does not begin again: give a data set or a "
                "function that returns a new iterator each time"
            )
        self._length = self._read
        return self[index % self._length]


JSON = (".jsonl", ".json")


def load_rows(task: TaskConfig, held_out: bool = False, given: Mapping[str, Any] | None = None) -> Rows:
    """The rows that task.name names (task.eval_name and task.eval_split for those held out); given: by their names.

    Raises DataError if there is no such source, or nothing in it.
    """
    name = (held_out and task.eval_name) or task.name
    if held_out and task.eval_split and Path(name).suffix in (*JSON, ".parquet"):
        raise DataError(
            f"task.eval_split = {task.eval_split!r}: {name} is one file and has no splits; name the held-out "
            "one in task.eval_name"
        )
    split = (held_out and task.eval_split) or task.split

    def open_rows() -> Any:
        if given and name in given:
            return given[name]
        return _load_rows(name, split, task, task.eval_seed if held_out else task.seed)

    try:
        rows: Any = open_rows()
        if not hasattr(rows, "__len__"):  # a stream: a function is called again for each reading
            rows = Streamed(open_rows)
            rows[0]
    except (
        OSError,
        LookupError,
        TypeError,
        ValueError,
        AssertionError,
    ) as error:  # what the libraries raise for wrong parameters
        raise DataError(f"task {name!r} with task.parameters = {task.parameters}: {error}") from error
    if len(rows) == 0:
        raise DataError(f"task {name!r} with {task.parameters} has no prompts; set task.parameters.size above 0")
    found: Rows = rows
    return found


def _load_rows(name: str, split: str, task: TaskConfig, seed: int) -> Any:
    path = Path(name).expanduser()
    if ":" in name:
        return load_function(name, "task.name")(split=split, **task.parameters)
    if path.suffix in JSON:
        return _json_lines(path)
    if not is_reasoning_gym(name):
        return _data_set(path, split, task.parameters)
    return _reasoning_gym(name, task.parameters, seed)


def is_reasoning_gym(name: str) -> bool:
    """Whether a name is one of reasoning_gym's tasks: neither a path, nor a hub id, nor a function."""
    return not any(sign in name for sign in "/:.") and not Path(name).is_dir()


def _json_lines(path: Path) -> list[Row]:
    """Read here and not by datasets, which gives a column one type: it fills the keys that other rows have with None,
    and refuses a column of mixed types."""
    rows: list[Row] = []
    for number, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1):  # a string may hold U+2028
        try:
            row = json.loads(line) if line.strip() else None
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: is not JSON: {error}") from error
        if row is not None and not isinstance(row, dict):
            raise DataError(f"{path}:{number}: must be an object with a prompt, not {type(row).__name__}")
        rows += [row] if row is not None else []
    return rows


def _data_set(path: Path, split: str, parameters: dict[str, Any]) -> Any:
    """A parquet file, a directory that datasets wrote, or a data set of the hub (memory-mapped, all of them): its rows,
    or an iterator of a stream's."""
    import datasets

    rows: Any
    if path.suffix == ".parquet":
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", **parameters)
    elif (path / "dataset_dict.json").is_file():
        rows = datasets.load_from_disk(str(path), **parameters)[split]
    elif (path / "dataset_info.json").is_file():
        rows = datasets.load_from_disk(str(path), **parameters)
    else:
        rows = datasets.load_dataset(str(path), split=split, **parameters)
    return Unfilled(rows) if hasattr(rows, "__len__") else map(unfilled, rows)


def _reasoning_gym(name: str, parameters: dict[str, Any], seed: int) -> Rows:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3)
        remedy = f"did you mean {' or '.join(near)}?" if near else "see reasoning_gym's gallery for the names"
        raise DataError(f"task.name = {name!r}: reasoning_gym has no such task; {remedy}")
    if "seed" in parameters:
        raise DataError("task.parameters.seed: set task.seed (training) and task.eval_seed (held out) instead")
    rows: Rows = reasoning_gym.create_dataset(name, **{"size": DEFAULT_SIZE, **parameters, "seed": seed})
    return rows
