"""The table of loss types, which Python reads from the library, against what the papers say."""

from __future__ import annotations

import pytest
import torch

from longgrpo import GRPOLossConfig, loss_normalizer
from longgrpo.loss.types import CORRECTIONS, EXACT_KL, KL_ESTIMATORS, LOSS_TYPES, loss_type

BY_SEQUENCES, BY_TOKENS = {"grpo", "sapo", "gmpo", "luspo"}, {"bnpo", "dapo", "cispo", "vespo"}
SEQUENCES, TOKENS, LONGEST = 7, 123, 64


def test_the_table_says_what_the_papers_say():
    rows = [loss_type(name) for name in LOSS_TYPES]
    assert {row.name for row in rows if row.mean == "sequence"} == {"grpo", "sapo", "gmpo"}
    assert {row.name for row in rows if row.whole_sequence} == {"vespo", "gmpo"}
    assert {row.name for row in rows if row.detached} == {"cispo", "vespo"}
    assert {row.name for row in rows if not row.ppo_clip} == {"cispo", "sapo", "vespo", "gmpo"}
    assert set(EXACT_KL) == {"exact_reverse", "exact_forward"} <= set(KL_ESTIMATORS)
    assert CORRECTIONS == ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@pytest.mark.parametrize("name", LOSS_TYPES)
@pytest.mark.parametrize("tensor", [False, True])
def test_normalizer(name, tensor):
    counts = [torch.tensor(float(n)) if tensor else n for n in (SEQUENCES, TOKENS)]
    value = loss_normalizer(GRPOLossConfig(loss_type=name, max_completion_length=LONGEST), *counts)
    wanted = SEQUENCES if name in BY_SEQUENCES else TOKENS if name in BY_TOKENS else SEQUENCES * LONGEST
    assert float(value) == wanted
    assert isinstance(value, torch.Tensor) == tensor
    assert float(loss_normalizer(GRPOLossConfig(loss_type=name), 0, 0, 1)) == 1


def test_normalizer_takes_the_length_from_the_config_first():
    assert loss_normalizer(GRPOLossConfig(loss_type="dr_grpo", max_completion_length=10), 2, 5, 99) == 20
    assert loss_normalizer(GRPOLossConfig(loss_type="dr_grpo"), 2, 5, 99) == 198
    with pytest.raises(ValueError, match="max_completion_length"):
        loss_normalizer(GRPOLossConfig(loss_type="dr_grpo"), 2, 5)


def test_an_unknown_type_is_an_error():
    with pytest.raises(ValueError, match=r"unknown loss_type 'ppo': choose one of grpo, bnpo"):
        loss_type("ppo")
