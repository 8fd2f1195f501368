"""The tables of loss types, KL estimators and off-policy corrections, as csrc/math/loss_types.h has them."""

from __future__ import annotations

from dataclasses import dataclass

from longgrpo._ops.library import ops


@dataclass(frozen=True)
class LossType:
    """What a loss type is beside its formula.

    Attributes:
        name: the `loss_type` of a config.
        mean: "sequence" if each sequence's tokens are averaged first, else "none".
        divides_by: "sequences", "tokens", or "lengths" for sequences times max_completion_length.
        whole_sequence: whether a token's gradient needs its whole sequence, at the token level too.
        ppo_clip: whether the policy term is PPO's clipped ratio.
        detached: whether the ratio (or the weight) of the policy term is not differentiated.
    """

    name: str
    mean: str
    divides_by: str
    whole_sequence: bool
    ppo_clip: bool
    detached: bool


def _rows(table: str) -> list[dict[str, str | bool]]:
    columns, *lines = (line.split() for line in table.strip().splitlines())
    said = {"0": False, "1": True}
    return [dict(zip(columns, (said.get(word, word) for word in line), strict=True)) for line in lines]


_types, _kl_estimators, _corrections = map(_rows, ops.loss_tables())
_TABLE = {row.name: row for row in (LossType(**values) for values in _types)}  # type: ignore[arg-type]

# In the order of the enums in C++.
LOSS_TYPES = tuple(_TABLE)
KL_ESTIMATORS = tuple(str(row["name"]) for row in _kl_estimators)
EXACT_KL = tuple(str(row["name"]) for row in _kl_estimators if row["exact"])
CORRECTIONS = tuple(str(row["name"]) for row in _corrections)
SEQUENCE_CORRECTIONS = tuple(str(row["name"]) for row in _corrections if row["of_sequence"])


def loss_type(name: str) -> LossType:
    """The table's row. Raises ValueError for a type that is not in it."""
    if name not in _TABLE:
        raise ValueError(f"unknown loss_type {name!r}: choose one of {', '.join(LOSS_TYPES)}")
    return _TABLE[name]
