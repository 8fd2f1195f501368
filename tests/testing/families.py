"""Tiny random checkpoints of the families of models that people train, and what works with each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from testing.models import random_model
from testing.tokenizer import character_tokenizer


class Family(NamedTuple):
    """What docs/families.md says of it. A message stands where it is refused."""

    kind: str  # config.json's model_type
    options: Mapping[str, Any] = MappingProxyType({})
    transformers: str = "yes"
    packing: str = "packed"  # or "one by one"
    nf4: str = "yes"
    plan: str = "counted"  # or "formulas", or "none"
    vllm: str = "yes"


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
OTHER_NAMES = "have other names here than in transformers' class"
NOT_VLLMS = "this vLLM has no implementation of its own for it"
SINKS = "attention with dropout, a softcap or sinks"
FAMILIES = {
    "Llama": Family("llama", plan="formulas"),
    "Mistral": Family("mistral", plan="formulas"),
    "Qwen2": Family("qwen2", plan="formulas"),
    "Qwen3": Family("qwen3", plan="formulas"),
    "Phi-3, Phi-4": Family("phi3", plan="formulas"),
    "Gemma 3": Family("gemma3_text", {"tie_word_embeddings": True, "sliding_window": 256}),
    "Granite": Family("granite"),
    "SmolLM3": Family("smollm3", vllm=NOT_VLLMS),
    "OLMo 2": Family("olmo2", vllm=NOT_VLLMS),
    "Qwen3-MoE": Family("qwen3_moe", EXPERTS | {"num_experts": 4}, nf4=OTHER_NAMES, plan="none", vllm=OTHER_NAMES),
    "Qwen3.5": Family(
        "qwen3_5_text", {"num_hidden_layers": 4}, packing="one by one", vllm="does not start for Qwen3_5ForCausalLM"
    ),
    "DeepSeek-V3": Family(
        "deepseek_v3",
        EXPERTS | {
            "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "topk_method": "noaux_tc",
            "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32,
            "head_dim": 16, "num_key_value_heads": 4,
        },
        nf4=OTHER_NAMES,
        plan="none",
        vllm="does not start for DeepseekV3ForCausalLM",
    ),
    "gpt-oss": Family(
        "gpt_oss",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 256},
        transformers=SINKS,
        nf4=SINKS,
        vllm=OTHER_NAMES,
    ),
}  # fmt: skip


def write_family(family: Family, directory: Path) -> Path:
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(directory)
    sizes: dict[str, Any] = dict(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=192, head_dim=32,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = random_model(family.kind, **sizes | dict(family.options))
    if family.kind.startswith("gemma"):
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(0.05)  # it is scaled up, and would drown what the layers add
    model.save_pretrained(directory)
    return directory
