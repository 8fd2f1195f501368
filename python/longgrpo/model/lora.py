"""Low-rank adapters, through PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from longgrpo.config.model import LoraConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def add_lora(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    """Wraps `model` in place. B starts at zero, A is drawn from `seed` (the global generator is left as it was).
    The base's parameters are frozen; the adapter's are fp32."""
    import peft

    if config.rank < 1:
        raise ValueError(f"lora.rank = {config.rank}: must be at least 1")
    if "lm_head" in config.targets:
        raise ValueError("lora.targets: lm_head stays frozen, because the loss reads its weight and not its output")
    lora = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=config.targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, lora)


def linear_names(directory: Path) -> list[str]:
    """The last names ("q_proj", ...) of the linear layers of the model in `directory`, the head left out."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory, local_files_only=True))
    head = model.get_output_embeddings()
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    return sorted({name.rpartition(".")[2] for name in linears})


def save_adapter(model: PeftModel, directory: Path) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, which peft loads."""
    model.save_pretrained(str(directory), save_embedding_layers=False)
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    if isinstance(config["target_modules"], list):  # written from a set, whose order no two processes share
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True))
