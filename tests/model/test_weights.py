"""A checkpoint, its config and the model class agree about every tensor, or the model is refused with the names."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from longgrpo.config.model import LoraConfig, ModelConfig
from longgrpo.config.rollout import RolloutConfig
from longgrpo.model.head import head_of
from longgrpo.model.load import check_weights, load_model
from longgrpo.model.lora import add_lora
from longgrpo.rollout.transformers import TransformersEngine
from testing.models import random_model

TOKENS = torch.tensor([[1, 5, 9, 30]])
UP = "model.layers.1.mlp.up_proj.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"


def write(directory, edit=None, **options):
    model = random_model("llama", **options)
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    if edit:
        edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return model, tensors


EDITS = {
    "head": (lambda t: t.pop("lm_head.weight"), r"missing: lm_head\.weight\."),
    "layer": (lambda t: t.pop(UP), f"missing: {UP}"),
    "bias": (lambda t: t.update({BIAS: torch.zeros(32)}), f"without a place in LlamaForCausalLM: {BIAS}"),
    "shape": (lambda t: t.update({UP: torch.zeros(40, 32)}), rf"{UP} \[40, 32\] for \[48, 32\]"),
    "many": (lambda t: [t.pop(n) for n in list(t) if "layers.1" in n], r"missing: .* and 5 more"),
}


@pytest.mark.parametrize("quantization", [None, "nf4"])
@pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=EDITS)
def test_a_tensor_too_few_or_too_many_or_of_another_shape_is_named(tmp_path, edit, message, quantization):
    write(tmp_path, edit, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=message):
        TransformersEngine(RolloutConfig(engine="transformers"), ModelConfig(str(tmp_path), quantization=quantization))
    with pytest.raises(ValueError, match=message):
        check_weights(tmp_path)


def test_a_checkpoint_that_cannot_be_read(tmp_path):
    write(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        check_weights(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        check_weights(tmp_path)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3", "gemma3_text", "mistral", "olmo2"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_writes_is_taken(tmp_path, architecture, tied):
    model = random_model(architecture, tie_word_embeddings=tied, pad_token_id=0)
    model.save_pretrained(tmp_path)
    check_weights(tmp_path)
    torch.testing.assert_close(load_model(tmp_path)(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_the_checkpoint_has_a_head_of_its_own_and_the_config_says_tied(tmp_path, quantization):
    sizes = dict(hidden_size=64, intermediate_size=64)
    torch.manual_seed(1)
    own = torch.randn(97, 64)
    model, _ = write(tmp_path, lambda t: t.update({"lm_head.weight": own}), tie_word_embeddings=True, **sizes)
    loaded = load_model(tmp_path, quantization=quantization)
    torch.testing.assert_close(head_of(loaded).weight, own, rtol=0, atol=0)
    torch.testing.assert_close(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    if not quantization:
        loaded.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is False
        torch.testing.assert_close(load_model(tmp_path / "again")(TOKENS).logits, loaded(TOKENS).logits)
    assert add_lora(loaded, LoraConfig(rank=2, targets=["q_proj"]), seed=0)


def test_a_copy_of_the_embedding_is_no_head_of_its_own(tmp_path):
    def copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    write(tmp_path, copy, tie_word_embeddings=True)
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.config.tie_word_embeddings is True
