"""Writes docs/config.md from the dataclasses of the config: python scripts/config_docs.py"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longgrpo.config.run import TrainConfig

PAGE = Path(__file__).parents[1] / "docs" / "config.md"
HEAD = """# The config of a run

A config is one YAML file. `longgrpo train CONFIG.yaml --group.key VALUE` overrides any key (the value is YAML, and a
number indexes a list: `--rewards.0.weight 0.5`), `--print-config` shows the whole config with its defaults, and a typo
is answered with the nearest key. Relative paths in the file are relative to it, those on the command line to the
current folder. `python scripts/config_docs.py` writes this page from the dataclasses.

The defaults of the loss and the algorithm are those of TRL 1.16's `GRPOConfig`, except for these:

| key | here | TRL 1.16 | why |
|---|---|---|---|
"""

DIFFERENCES = [
    ("train.learning_rate", "1e-6", "null: 1e-5 for an adapter, which needs about ten times as much, else TRL's"),
    ("train.betas", "[0.9, 0.999]", "TRL's second moment averages over a thousand steps, longer than most runs"),
    ("train.schedule", "linear", "with a constant rate a run can be extended, and its steps are comparable"),
    ("rollout.max_completion_length", "512", "set it to what the task needs"),
    ("rollout.importance", "sequence_mask, cap 3", "engine and trainer share weights, so there is little to correct"),
    ("loss.kl_correction", "true (`use_bias_correction_kl`)", "used if beta is not 0; plain k3 is the paper's"),
    ("task.chat", "only if the data has messages", "a chat model answers a bare question through its template"),
    ("memory.checkpoint", "checkpointing on (`gradient_checkpointing`)", "packed micro-batches limit the activations"),
]


def render() -> str:
    lines = [HEAD.rstrip("\n")]
    for key, theirs, why in DIFFERENCES:
        lines.append(f"| `{key}` | {_code(_default_at(key))} | {theirs} | {why} |")
    for name, hint in hints(TrainConfig).items():
        for group in dataclasses_in(hint):
            lines += ["", f"## {name}", "", _cell(_about(group)), *_table(group)]
    own = [f for f in dataclasses.fields(TrainConfig) if not dataclasses_in(hints(TrainConfig)[f.name])]
    lines += ["", "## Keys of the run itself", "", *_rows(TrainConfig, own)]
    return "\n".join(lines) + "\n"


def _table(group: type) -> list[str]:
    return ["", *_rows(group, dataclasses.fields(group))]


def _rows(group: type, fields: Any) -> list[str]:
    return ["| key | type | default | |", "|---|---|---|---|", *_keys(group, fields)]


def _keys(group: type, fields: Any, prefix: str = "") -> Iterator[str]:
    """A row for each field; one that is a group itself has a row for each of its own."""
    docs, typed = field_docs(group), typing.get_type_hints(group)
    annotations = {name: hint for cls in _bases(group) for name, hint in inspect.get_annotations(cls).items()}
    for field in fields:
        if prefix == "" and group is not TrainConfig and (nested := dataclasses_in(typed[field.name])):
            yield from _keys(nested[0], dataclasses.fields(nested[0]), f"{field.name}.")
            continue
        kind = str(annotations[field.name]).replace("|", "\\|")
        about = _cell(docs.get(field.name, ""))
        yield f"| `{prefix}{field.name}` | `{kind}` | {_code(_default(field))} | {about} |"


def _bases(cls: type) -> list[type]:
    """The dataclasses that a class is made of, itself last."""
    return [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]


def field_docs(cls: type) -> dict[str, str]:
    """The description of each field, inherited ones included."""
    return {name: text for base in _bases(cls) for name, text in _own_field_docs(base).items()}


def _own_field_docs(cls: type) -> dict[str, str]:
    """The string below each field, or the field's entry under "Attributes:" in the docstring of the class."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    docs = {}
    for field, text in itertools.pairwise(body):
        is_text = (
            isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
        )
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            docs[field.target.id] = inspect.cleandoc(text.value.value)
    _, _, attributes = inspect.getdoc(cls).partition("Attributes:\n")
    for entry in re.split(r"\n(?=    \w)", attributes):
        names, _, text = entry.strip().partition(": ")
        docs |= {name.strip(): text for name in names.split(",") if text}
    return docs


def _about(cls: type) -> str:
    return inspect.getdoc(cls).partition("\n\nAttributes:")[0]


def hints(cls: type) -> dict[str, Any]:
    return {name: hint for name, hint in typing.get_type_hints(cls).items() if not name.startswith("_")}


def dataclasses_in(hint: Any) -> list[type]:
    """The dataclasses in X, X | None, list[X]."""
    if dataclasses.is_dataclass(hint):
        return [typing.cast(type, hint)]
    return [found for argument in typing.get_args(hint) for found in dataclasses_in(argument)]


def _default(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else "required"


def _default_at(key: str) -> Any:
    group, _, name = key.partition(".")
    (cls,) = dataclasses_in(hints(TrainConfig)[group])
    return _default(next(field for field in dataclasses.fields(cls) if field.name == name))


def _code(value: Any) -> str:
    if value == "required":
        return "required"
    shown = (
        {None: "null", True: "true", False: "false"}[value]
        if value is None or value is True or value is False
        else value
    )
    return f"`{list(shown) if isinstance(shown, tuple) else shown}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(render())
