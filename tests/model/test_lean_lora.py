"""LoRA without its large intermediates, against PEFT's own forward."""

import pytest
import torch

from longgrpo.config.model import LoraConfig
from longgrpo.model.lean_lora import use_lean_lora
from longgrpo.model.lora import add_lora
from testing.models import random_model

IDS = torch.arange(40).view(2, 20) % 97


def adapted(dtype=torch.float64, **options):
    model = add_lora(random_model("llama").to(dtype), LoraConfig(rank=4, alpha=8, **options), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
    return model


def step(model):
    hidden = model.get_base_model().model(IDS).last_hidden_state
    hidden.float().square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return hidden.detach(), gradients


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_same_outputs_and_gradients(targets, checkpointed):
    model = adapted(targets=targets)
    hidden, want = step(model)
    use_lean_lora(model)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    ours, gradients = step(model)
    torch.testing.assert_close(ours, hidden, rtol=1e-12, atol=1e-12)
    assert gradients.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(gradients[name], want[name], rtol=1e-5, atol=1e-9)  # the adapter is fp32


def test_bf16_is_as_near_to_float64_as_peft_is():
    exact = adapted()
    model = adapted(torch.bfloat16)
    for name, parameter in exact.named_parameters():
        parameter.data = model.get_parameter(name).data.double()
    _, truth = step(exact)
    _, peft = step(model)
    _, ours = step(use_lean_lora(model))
    for name, gradient in truth.items():
        error = [(g[name].double() - gradient).norm() / gradient.norm() for g in (ours, peft)]
        assert error[0] <= 2 * error[1] + 2**-8


def test_without_its_adapter_it_is_the_base():
    model = use_lean_lora(adapted())
    base = random_model("llama").double()
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(IDS).logits, base(IDS).logits)


def test_keeps_its_input_once_and_in_its_own_dtype():
    model = adapted(torch.bfloat16, targets=["q_proj", "k_proj", "v_proj"])

    def kept():
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage()._cdata] = tensor
            return tensor

        attention = model.get_base_model().model.layers[0].self_attn
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            attention.q_proj(x)
            attention.k_proj(x)
        return sum(t.nbytes for t in storages.values() if t.numel() >= x.numel())

    x = torch.randn(1, 64, 32, dtype=torch.bfloat16, requires_grad=True)
    assert kept() == 2 * 2 * x.nbytes
    use_lean_lora(model)
    assert kept() == x.nbytes


@pytest.mark.parametrize("case", ["autocast", "bias"])
def test_what_it_does_not_do_is_pefts_own(case):
    import peft

    def made():
        lora = peft.LoraConfig(r=4, target_modules="all-linear", lora_bias=case == "bias", task_type="CAUSAL_LM")
        model = peft.get_peft_model(random_model("llama"), lora)
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(i))
        return model

    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        hidden, want = step(made())
        ours, gradients = step(use_lean_lora(made()))
    torch.testing.assert_close(ours, hidden, rtol=0, atol=0)
    assert gradients.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(gradients[name], want[name], rtol=0, atol=0)
