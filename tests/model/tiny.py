"""Small random models, built in milliseconds."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def tiny_model(architecture, **options):
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes | options))
