import peft
import pytest
import torch

from longgrpo.config.model import LoraConfig, ModelConfig
from longgrpo.config.rollout import RolloutConfig
from longgrpo.model.head import head_of
from longgrpo.model.load import backbone
from longgrpo.model.lora import add_lora, check_lora, save_adapter
from longgrpo.rollout.factory import make_engine
from testing.models import random_model, trainable_parameters

TOKENS = torch.tensor([[1, 5, 9, 30]])


def test_a_fresh_adapter_changes_nothing():
    model = random_model("llama")
    expected = model(TOKENS).logits
    adapted = add_lora(model, LoraConfig(rank=4), seed=0)
    torch.testing.assert_close(adapted(TOKENS).logits, expected, rtol=0, atol=0)


def test_the_seed_decides_the_adapter_and_the_global_generator_stays():
    state = torch.get_rng_state()
    first, second, other = (
        [p.detach().clone() for p in trainable_parameters(add_lora(random_model("llama"), LoraConfig(), seed))]
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    model = random_model("llama")
    state = torch.get_rng_state()
    add_lora(model, LoraConfig(), seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_all_linear_layers_but_the_head_are_trained():
    model = add_lora(random_model("llama"), LoraConfig(rank=3, alpha=6), seed=0)
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 2 * 7 * 2  # layers x linears x (A, B)
    assert not any("lm_head" in name for name in names)
    assert head_of(model).weight.shape == (97, 32)
    assert backbone(model) is model.get_base_model().model
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert layer.scaling == {"default": 2.0}
    assert {p.dtype for p in trainable_parameters(model)} == {torch.float32}


def test_a_saved_adapter_loads_with_peft(tmp_path):
    model = add_lora(random_model("qwen2"), LoraConfig(rank=4, targets=["q_proj", "down_proj"]), seed=0)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.add_(1)
    save_adapter(model, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    loaded = peft.PeftModel.from_pretrained(random_model("qwen2"), tmp_path)
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=0)


def test_a_half_precision_base_has_an_fp32_adapter():
    model = add_lora(random_model("llama").bfloat16(), LoraConfig(), seed=0)
    assert {p.dtype for p in trainable_parameters(model)} == {torch.float32}


@pytest.mark.parametrize(("config", "message"), [
    (LoraConfig(rank=0), "rank = 0"),
    (LoraConfig(targets=["q_proj", "lm_head"]), "lm_head"),
    (LoraConfig(targets=["no_such"]), "no_such"),
])  # fmt: skip
def test_wrong_configs_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        add_lora(random_model("llama"), config, seed=0)


@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["model.embed_tokens"], ["lm_head"]])
def test_a_tied_weight_takes_no_adapter_and_nothing_is_built(tmp_path, targets, monkeypatch):
    random_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    monkeypatch.setattr("longgrpo.rollout.transformers.load_model", None)  # it must not come so far
    config = RolloutConfig(engine="transformers")
    with pytest.raises(ValueError, match=r"lora\.targets: .*(embed_tokens|lm_head).*leave it out"):
        make_engine(config, ModelConfig(str(tmp_path)), LoraConfig(targets=targets))


def test_an_embedding_that_is_not_tied_takes_an_adapter(tmp_path):
    random_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path)
    config = LoraConfig(rank=2, targets=["embed_tokens", "q_proj"])
    check_lora(tmp_path, config)
    model = add_lora(random_model("llama", tie_word_embeddings=False), config, seed=0)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.normal_(std=0.1)
    adapted = model(TOKENS).logits
    save_adapter(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(random_model("llama", tie_word_embeddings=False), tmp_path / "adapter")
    torch.testing.assert_close(loaded.merge_and_unload()(TOKENS).logits, adapted)
