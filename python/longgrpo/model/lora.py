"""Low-rank adapters, through PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longgrpo.config.model import LoraConfig
from longgrpo.model.head import base_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def add_lora(model: PreTrainedModel, config: LoraConfig, seed: int) -> PeftModel:
    """Wraps `model` in place. B starts at zero, A is drawn from `seed` (the global generator is left as it was).
    The base's parameters are frozen; the adapter's are fp32.

    Raises ValueError for targets that do not exist, for the head, whose weight the loss reads and not its output, and
    for a tied weight, of which an adapter would change one of two uses.
    """
    import peft

    if config.rank < 1:
        raise ValueError(f"lora.rank = {config.rank}: must be at least 1")
    lora = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=config.targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            adapted = peft.get_peft_model(model, lora)
        except ValueError as error:
            raise ValueError(f"lora.targets = {config.targets!r}: {error}") from error
    _check_targets(adapted)
    return adapted


def check_lora(directory: Path, config: LoraConfig) -> None:
    """Raises ValueError as add_lora does, before the model in `directory` is loaded."""
    add_lora(_outline(directory), config, seed=0)


def _check_targets(model: PeftModel) -> None:
    base = base_model(model)
    users: dict[int, list[str]] = {}  # of a weight
    for name, module in base.named_modules():
        if isinstance(weight := getattr(module, "weight", None), torch.Tensor):
            users.setdefault(id(weight), []).append(name.removesuffix(".base_layer"))
    head = base.get_output_embeddings()
    for name, layer in lora_layers(model).items():
        if layer is head:
            raise ValueError(
                f"lora.targets: {name} stays frozen, because the loss reads its weight and not its output: leave it out"
            )
        tied = sorted({*users[id(layer.get_base_layer().weight)]} - {name})
        if tied:
            raise ValueError(
                f"lora.targets: {name} has the weight of {', '.join(tied)} (tied), which an adapter on one of them "
                "would take apart: leave it out"
            )


def lora_layers(model: PeftModel) -> dict[str, Any]:
    """PEFT's layers with an adapter, by the names that they have in the base model."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in base_model(model).named_modules() if isinstance(module, LoraLayer)}


def _outline(directory: Path) -> PreTrainedModel:
    """The model in `directory`, on meta."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(directory, local_files_only=True)
        )
    return model


def linear_names(directory: Path) -> list[str]:
    """The last names ("q_proj", ...) of the linear layers of the model in `directory`, the head left out."""
    model = _outline(directory)
    head = model.get_output_embeddings()
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    return sorted({name.rpartition(".")[2] for name in linears})


def save_adapter(model: PeftModel, directory: Path, base: str | None = None) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, which peft loads. `base`: the hub id of the base model;
    None: the adapter names the directory that it was loaded from."""
    model.save_pretrained(str(directory), save_embedding_layers=False)
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    if base:
        config["base_model_name_or_path"] = base
    if isinstance(config["target_modules"], list):  # written from a set, whose order no two processes share
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True))
