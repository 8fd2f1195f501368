"""Bad input meets a message that names the value and the remedy, before any work."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from longgrpo import GRPOLossConfig, grpo_loss, linear_grpo_loss, linear_logprob
from testing.cases import make_head


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dapoo"}, "did you mean 'dapo'"),
        ({"kl": "k4"}, "unknown kl 'k4'"),
        ({"importance_level": "sequnce"}, "did you mean 'sequence'"),
        ({"beta": -1.0}, "beta must be"),
        ({"beta": float("nan")}, "beta must be"),
        ({"epsilon": -0.1}, "epsilon must be"),
        ({"epsilon_high": -0.1}, "epsilon_high must be"),
        ({"delta": 0.0}, "delta"),
        ({"max_completion_length": 0}, "max_completion_length must be"),
        ({"sapo_temperature_pos": 0.0}, "sapo_temperature_pos"),
        ({"kl": "k2", "kl_correction": True}, "corrects kl='k3'"),
        ({"loss_type": "cispo", "delta": 2.0}, "delta is a bound"),
        ({"loss_type": "vespo", "detach": False}, "detach=False"),
        ({"loss_type": "gmpo", "importance_level": "sequence"}, "weight of its own"),
    ],
)
def test_config(options, message):
    with pytest.raises(ValueError, match=message):
        GRPOLossConfig(**options)


def score(head, **changes):
    arguments = {"hidden": head.hidden, "weight": head.weight, "target": head.target, **changes}
    return linear_logprob(arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("target"), **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"target": torch.zeros(5, dtype=torch.int64)}, ValueError, "hidden must be"),
        ({"target": torch.zeros(6, dtype=torch.int32)}, TypeError, "int64"),
        ({"target": torch.tensor([0, 0, 0, 99, 0, 0])}, ValueError, r"target\[3\] = 99 is outside the vocabulary of 9"),
        ({"weight": torch.zeros(9, 5)}, ValueError, r"weight must be \[vocabulary, 4\]"),
        ({"weight": torch.zeros(9, 4, dtype=torch.float64)}, TypeError, "weight must be float32"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias must be \[9\]"),
        ({"temperature": 0.0}, ValueError, "temperature must be > 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be > 0"),
        ({"temperature": torch.zeros(6)}, ValueError, "temperature must be > 0"),
        ({"temperature": torch.ones(5)}, ValueError, "target's shape"),
        ({"softcap": 0.0}, ValueError, "softcap must be > 0"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be > 0"),
        ({"workspace": 100}, ValueError, "workspace of 100 bytes is too small.*give workspace >="),
    ],
)
def test_head(changes, error, message):
    with pytest.raises(error, match=message):
        score(make_head(1, 6, 4, 9), **changes)


def test_the_named_workspace_is_enough():
    head = make_head(1, 6, 4, 9)
    with pytest.raises(ValueError) as caught:
        score(head, workspace=100)
    needed = int(str(caught.value).split("workspace >= ")[1].split()[0])
    assert torch.equal(score(head, workspace=needed).logp, score(head).logp)
    with pytest.raises(ValueError):
        score(head, workspace=needed - 1)


def test_non_finite_hidden_states_are_found_on_request(monkeypatch):
    head = make_head(1, 6, 4, 9)
    head.hidden[4, 0] = float("inf")
    monkeypatch.setenv("LONGGRPO_CHECK_FINITE", "1")
    with pytest.raises(FloatingPointError, match="hidden of token 4"):
        score(head)


LOGP = torch.zeros(6)


@pytest.mark.parametrize(
    ("arguments", "config", "message"),
    [
        ({"advantages": torch.zeros(2)}, {}, "need cu_seqlens"),
        ({"advantages": torch.zeros(6)}, {"loss_type": "grpo"}, "need cu_seqlens"),
        ({"advantages": torch.zeros(3), "cu_seqlens": torch.tensor([0, 2, 6])}, {}, "advantages .* 2 sequences"),
        ({"cu_seqlens": torch.tensor([0, 2, 5])}, {}, "rise from 0 to the 6 tokens"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, {}, "rise from 0"),
        ({"mask": torch.ones(5)}, {}, "mask"),
        ({"old_logp": torch.ones(5)}, {}, "old_logp"),
        ({"entropy": torch.ones(5)}, {}, "entropy"),
        ({"normalizer": 0.0}, {}, "normalizer must be > 0"),
        ({}, {"beta": 0.1}, "needs ref_logp"),
        ({}, {"entropy_coef": 0.1}, "needs entropy"),
        ({}, {"beta": 0.1, "kl": "exact_reverse"}, "use linear_grpo_loss"),
        ({"old_logp": LOGP}, {"detach": False}, "leave old_logp out"),
        ({"cu_seqlens": torch.tensor([0, 6])}, {"loss_type": "dr_grpo"}, "max_completion_length"),
    ],
)
def test_loss(arguments, config, message):
    arguments = {"advantages": torch.zeros(6), **arguments}
    with pytest.raises(ValueError, match=message):
        grpo_loss(LOGP, arguments.pop("advantages"), **arguments, config=GRPOLossConfig(**config))


def test_exact_kl_needs_its_reference():
    head, config = make_head(1, 6, 4, 9), GRPOLossConfig(beta=0.1, kl="exact_forward")
    arguments = (head.hidden, head.weight, head.target, torch.zeros(6))
    with pytest.raises(ValueError, match="needs ref_hidden"):
        linear_grpo_loss(*arguments, config=config)
    head.weight.requires_grad_()
    with pytest.raises(ValueError, match="trainable head needs ref_weight"):
        linear_grpo_loss(*arguments, ref_hidden=head.hidden, config=config)


FORWARD_MODE = {
    "linear_logprob": lambda x, w: linear_logprob(x, w, torch.arange(3)).logp.sum(),
    "grpo_loss": lambda x, w: grpo_loss(x[:, 0], torch.ones(3)).loss,
    "entropy": lambda x, w: (
        grpo_loss(torch.zeros(3), torch.ones(3), entropy=x[:, 0], config=GRPOLossConfig(entropy_coef=0.1)).loss
    ),
    "linear_grpo_loss": lambda x, w: linear_grpo_loss(x, w, torch.arange(3), torch.ones(3)).loss,
    "weight": lambda x, w: linear_logprob(w[:3].detach(), x.new_ones(7, 4) * x[0], torch.arange(3)).logp.sum(),
}


@pytest.mark.parametrize("name", FORWARD_MODE)
@pytest.mark.parametrize("trained", [True, False])
def test_forward_mode_is_refused(name, trained):
    hidden, weight = torch.randn(3, 4).requires_grad_(trained), torch.randn(7, 4)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda x: FORWARD_MODE[name](x, weight), (hidden,), (torch.ones(3, 4),))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(hidden, torch.ones(3, 4))
        with pytest.raises(RuntimeError, match="forward-mode"):
            FORWARD_MODE[name](dual, weight)
        FORWARD_MODE[name](hidden, weight)  # no tangent here
