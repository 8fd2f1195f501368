"""vLLM on small random models: an engine takes 1.5 s, and a process holds one at a time."""

from contextlib import contextmanager

import torch

from longgrpo.config.model import ModelConfig
from longgrpo.model.lora import add_lora
from longgrpo.rollout import RolloutConfig, Sampling, make_engine
from testing.models import random_model, trainable_parameters

VOCABULARY = 1000  # not a multiple of 64: vLLM pads it
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
PROMPTS = [[3 + i] * (20 + 5 * i) for i in range(4)]
RANDOM = Sampling(max_tokens=16, ignore_eos=True)


def write_model(architecture, directory, **sizes):
    model = random_model(
        architecture, tie_word_embeddings=architecture.startswith("gemma"), pad_token_id=0, **SIZES | sizes
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # made as zeros and ones, which would hide a mix-up
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
        if architecture.startswith("gemma"):  # its embedding is scaled up, and would drown what the layers add
            model.get_input_embeddings().weight.mul_(0.05)
    model.save_pretrained(directory)
    return set(model.state_dict())


@contextmanager
def running(directory, lora=None, dtype="float32", quantization=None, **rollout):
    """An engine on the model in `directory`, and the model to train: adapted, where there is `lora`."""
    options = {"kv_cache_gib": 0.05, **rollout}
    engine = make_engine(
        RolloutConfig(engine="vllm", **options), ModelConfig(str(directory), dtype, quantization), lora
    )
    try:
        model = add_lora(engine.model, lora, seed=0) if lora else engine.model
        engine.attach(model)
        yield engine, model
    finally:
        engine.close()


@torch.no_grad()
def change(model, alpha=0.1):
    """An update of every trained weight: of the adapter, or of the whole model."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(model) or model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=alpha)


def sample(engine):
    return engine.generate(PROMPTS, RANDOM, range(len(PROMPTS)))
