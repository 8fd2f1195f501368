"""Plain transformers models: our numbers beside those of the model's own logits."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from longgrpo.integrations.huggingface import CausalLMLogProb, causal_lm_logprob
from longgrpo.model.head import logit_options
from testing import ROOT, load
from testing.models import random_model

ARCHITECTURES = {
    "llama": {}, "qwen3": {}, "phi": {}, "nanochat": {},
    "gemma2": {"final_logit_softcapping": 3.0}, "gemma3_text": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.25}, "cohere2": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 4.0}, "hyperclovax": {"logits_scaling": 4.0},
}  # fmt: skip


def own_logp(model, ids, labels, temperature=1.0):
    rows = torch.log_softmax(model(input_ids=ids).logits.double()[:, :-1] / temperature, -1)
    logp = rows.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    return torch.where(labels[:, 1:] < 0, 0, logp), -(rows.exp() * rows).sum(-1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_architecture(architecture):
    """Phi's head has a bias; the others cap or scale their logits, or do neither."""
    model = random_model(architecture, **ARCHITECTURES[architecture]).eval()
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    wanted, entropy = own_logp(model, ids, ids, temperature=0.7)
    actual = causal_lm_logprob(model, ids, temperature=0.7, entropy=True)
    torch.testing.assert_close(actual.logp.double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.entropy.double(), entropy, rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(wanted.sum(), model.get_input_embeddings().weight)[0]
    gradient = torch.autograd.grad(actual.logp.sum(), model.get_input_embeddings().weight)[0]
    assert (gradient - expected).norm() <= 1e-4 * expected.norm()


def test_options_of_a_plain_config_are_neutral():
    assert logit_options(random_model("llama").config) == {"softcap": None, "logit_scale": 1.0}


def test_labels_and_attention_mask():
    model = random_model("llama").eval()
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    wanted, _ = own_logp(model, ids, labels)
    torch.testing.assert_close(causal_lm_logprob(model, ids, mask).logp.double(), wanted, rtol=1e-4, atol=1e-5)
    labels[:, :4] = -100
    prompt_free = causal_lm_logprob(model, ids, mask, labels=labels).logp
    assert torch.equal(prompt_free == 0, labels[:, 1:] < 0)


def test_an_adapter_on_the_head_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(random_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ValueError, match="head carries a PEFT adapter: leave lm_head out"):
        causal_lm_logprob(model, torch.ones(1, 4, dtype=torch.int64))


def test_lora_and_its_base():
    peft = pytest.importorskip("peft")
    plain = random_model("llama").eval()
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(3))
    base = causal_lm_logprob(plain, ids).logp
    model = peft.get_peft_model(plain, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    module = CausalLMLogProb(model)
    torch.testing.assert_close(module(ids).logp.double(), own_logp(model, ids, ids)[0], rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(module(ids).logp, base)
    module(ids).logp.sum().backward()
    assert all((p.grad is not None) == ("lora" in n) for n, p in model.named_parameters())


@pytest.mark.parametrize("example", ["huggingface_sft", "huggingface_dpo"])
def test_example(example, model_directory):
    """The examples learn what they are shown."""
    module = load(ROOT / "examples" / "integrations" / f"{example}.py")
    model = AutoModelForCausalLM.from_pretrained(model_directory)
    losses = module.train(model, module.encode(model_directory), steps=12, learning_rate=3e-3)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("method", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_prompt_tuning_is_refused_by_name(method):
    import peft

    config = getattr(peft, method)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(random_model("llama"), config)
    with pytest.raises(ValueError, match=config.peft_type.value):
        causal_lm_logprob(model, torch.arange(8)[None])
