"""A run's weights in the forms that others load: an adapter for PEFT and vLLM, a model for transformers and vLLM."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from longgrpo.config.model import Dtype
from longgrpo.config.run import load_config
from longgrpo.errors import ConfigError
from longgrpo.model.load import load_model, load_tokenizer, resolve_model
from longgrpo.run import checkpoint
from longgrpo.run.files import replace_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Form = Literal["adapter", "model"]


def export(run: Path, directory: Path, form: Form, which: str = "last", dtype: Dtype | None = None) -> Path:
    """Writes the weights of a checkpoint of `run` into `directory`, safetensors and all that their loaders ask for.

    form: "adapter" as PEFT keeps it, or "model", the whole model, under LoRA with the adapter merged into it.
    which: see checkpoint.find. dtype: of a model; default model.dtype. The adapter is merged in float32 and the sum
    rounded once. Raises ConfigError if the run has no adapter, if its model is quantized and cannot be merged with the
    adapter, if `directory` exists already, and as find does.
    """
    config = load_config(run / "config.yaml")
    saved = checkpoint.find(run, which)
    if directory.exists():
        raise ConfigError(f"{directory} exists already: name a new directory")
    checkpoint.verify(saved)
    if form == "adapter":
        if not config.lora:
            raise ConfigError(f"{run} trained all weights and has no adapter: export it as a model")
        replace_directory(directory, lambda path: _copy(saved / "adapter", path), new=True)
        return saved
    if config.model.quantization:
        raise ConfigError(
            f"{run}: the adapter was trained on {config.model.quantization} weights, and merged into others it would "
            "give another model: export it as an adapter"
        )
    base = resolve_model(config.model.path)
    model = load_model(base, "float32")
    if config.lora:
        from peft import PeftModel

        adapters = [config.lora.merged] if config.lora.merged else []
        for adapter in [*adapters, str(saved / "adapter")]:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    else:
        tensors = checkpoint.read_tensors(saved)
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("weight.reference.")}
        checkpoint.load_weights(saved, own, dict(model.named_parameters()))
    model.to(getattr(torch, dtype or config.model.dtype))
    tokenizer = load_tokenizer(base, config.task.chat_template)
    replace_directory(directory, lambda path: write_model(model, tokenizer, path), new=True)
    return saved


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """The model and its tokenizer as from_pretrained loads them."""
    # Each with storage of its own: an engine's are parts of fused ones, which safetensors would write whole.
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.save_pretrained(directory, state_dict=weights)
    tokenizer.save_pretrained(directory)


def _copy(source: Path, directory: Path) -> None:
    shutil.copytree(source, directory, dirs_exist_ok=True)
