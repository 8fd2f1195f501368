"""Run by test_vllm.py: share_tiny_model.py ARCHITECTURE DIRECTORY. Shares a small random model and changes it."""

import sys

import torch
from agreement import assert_agrees
from transformers import AutoConfig, AutoModelForCausalLM

from longgrpo.model.load import ModelConfig
from longgrpo.model.lora import LoraConfig, add_lora, trainable_parameters
from longgrpo.rollout import RolloutConfig, Sampling, make_engine, vllm_private

VOCABULARY = 1000  # not a multiple of 64: vLLM pads it


def write_model(architecture, directory):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # made as zeros and ones, which would hide a mix-up
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    model.save_pretrained(directory)
    return set(model.state_dict())


def check(model, engine, prompts):
    engine.weights_changed()
    assert_agrees(model, prompts, engine.generate(prompts, Sampling(max_tokens=16), range(len(prompts))))


def main(architecture, directory):
    names = write_model(architecture, directory)
    engine = make_engine(RolloutConfig(engine="vllm", kv_cache_gib=0.1), ModelConfig(directory))
    model = engine.model
    assert set(model.state_dict()) == names
    engine_storages = {p.untyped_storage().data_ptr() for p in vllm_private.engine_module(engine.llm).parameters()}
    assert {p.untyped_storage().data_ptr() for p in model.parameters()} == engine_storages
    assert not any(buffer.is_meta for buffer in model.buffers())

    prompts = [[3 + i] * (20 + 5 * i) for i in range(4)]
    check(model, engine, prompts)
    adapted = add_lora(model, LoraConfig(rank=4), seed=0)
    with torch.no_grad():
        for parameter in trainable_parameters(adapted):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    engine.attach(adapted)
    check(adapted, engine, prompts)
    engine.attach(adapted.unload())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    check(model, engine, prompts)


if __name__ == "__main__":
    main(*sys.argv[1:])
