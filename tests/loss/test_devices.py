"""Where each argument of each public function may lie, with meta as the other device."""

from __future__ import annotations

import pytest
import torch

from longgrpo import GRPOLossConfig, LinearGRPOLoss, OffPolicyCorrection, grpo_loss, linear_grpo_loss, linear_logprob
from longgrpo.loss.inputs import LossInputs
from longgrpo.loss.tokens import LossTokens

N, H, V = 6, 4, 9
CORRECTION = OffPolicyCorrection("token_truncate")
CONFIG = GRPOLossConfig(loss_type="grpo", beta=0.1, kl="exact_reverse", entropy_coef=0.1)
TOKENS = {
    "advantages": torch.ones(2), "mask": torch.ones(N, dtype=torch.bool), "old_logp": torch.zeros(N),
    "cu_seqlens": torch.tensor([0, 2, N], dtype=torch.int32), "ref_logp": torch.zeros(N),
    "sampling_logp": torch.zeros(N), "importance": torch.ones(2),
}  # fmt: skip
NORMALIZER = {"normalizer": torch.tensor(2.0)}
TARGET = {"target": torch.zeros(N, dtype=torch.int64), "temperature": torch.ones(N)}
HEAD = {"hidden": torch.zeros(N, H), "weight": torch.zeros(V, H), "bias": torch.zeros(V)}
REFERENCE = {"ref_hidden": torch.zeros(N, H), "ref_weight": torch.zeros(V, H)}


def fused(**tensors):
    return linear_grpo_loss(**tensors, correction=CORRECTION, config=CONFIG).loss


def module(hidden, weight, target, advantages, **tensors):
    return LinearGRPOLoss(CONFIG)(hidden, weight, target, advantages, correction=CORRECTION, **tensors).loss


def own_inputs(logp, entropy, **tokens):
    return LossInputs.of(logp, entropy, LossTokens(**tokens), 1.0).advantages


FUNCTIONS = {
    "linear_logprob": (lambda **x: linear_logprob(**x).logp, HEAD, TARGET),
    "linear_grpo_loss": (fused, HEAD | REFERENCE, TARGET | TOKENS | NORMALIZER),
    "LinearGRPOLoss": (module, HEAD | REFERENCE, TARGET | TOKENS | NORMALIZER),
    "grpo_loss": (
        lambda **x: grpo_loss(**x, correction=CORRECTION, config=GRPOLossConfig(beta=0.1, entropy_coef=0.1)).loss,
        {"logp": torch.zeros(N)}, TOKENS | NORMALIZER | {"entropy": torch.zeros(N)},
    ),
    "LossInputs.of": (own_inputs, {"logp": torch.zeros(N), "entropy": torch.zeros(N)}, TOKENS),
}  # fmt: skip
MODEL = [(f, name) for f, (_, model, _) in FUNCTIONS.items() for name in model]
SMALL = [(f, name) for f, (_, _, small) in FUNCTIONS.items() for name in small]


def arguments(function: str, device: str) -> dict[str, torch.Tensor]:
    _, model, small = FUNCTIONS[function]
    return {name: tensor.to(device) for name, tensor in (model | small).items()}


@pytest.mark.parametrize(("function", "name"), SMALL)
def test_a_small_tensor_on_the_cpu_is_moved(function, name):
    x = arguments(function, "meta")
    x[name] = x[name].new_ones(x[name].shape, device="cpu")
    if name == "cu_seqlens":
        x[name] = TOKENS[name]
    assert FUNCTIONS[function][0](**x).device.type == "meta"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_all_of_them_together(function):
    run, model, small = FUNCTIONS[function]
    assert run(**{name: tensor.to("meta") for name, tensor in model.items()}, **small).device.type == "meta"


@pytest.mark.parametrize(("function", "name"), SMALL)
def test_a_small_tensor_on_another_device_is_refused(function, name):
    """Never read: its memory is not the CPU's."""
    x = arguments(function, "cpu")
    x[name] = x[name].to("meta")
    with pytest.raises(ValueError, match=rf"^{name} is on meta and \w+ on cpu: move {name} to cpu"):
        FUNCTIONS[function][0](**x)


@pytest.mark.parametrize(("device", "other"), [("cpu", "meta"), ("meta", "cpu")])
@pytest.mark.parametrize(("function", "name"), [x for x in MODEL if x[1] not in ("hidden", "logp")])
def test_a_tensor_of_the_model_is_never_moved(function, name, device, other):
    x = arguments(function, device)
    x[name] = torch.zeros_like(x[name], device=other)
    with pytest.raises(ValueError, match=rf"^{name} is on {other} and \w+ on {device}: move {name} to {device}"):
        FUNCTIONS[function][0](**x)
