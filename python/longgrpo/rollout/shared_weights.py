"""The trained model on the engine's own storage, and LoRA merged into it for as long as a rollout lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longgrpo.model.load import base_model

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def model_on(views: dict[str, Tensor], directory: Path) -> PreTrainedModel:
    """The model that `directory` describes, on the very tensors in `views` (checkpoint name -> tensor).

    Raises NotImplementedError where the names do not fit: an architecture that the engine lays out in a way of its own.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    some = next(iter(views.values()))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=some.dtype)
    if config.tie_word_embeddings:
        views = views | {"lm_head.weight": views["model.embed_tokens.weight"]}
    try:
        model.load_state_dict(views, assign=True)
    except RuntimeError as error:
        kind = type(model).__name__
        raise NotImplementedError(f"{kind} does not map onto the engine's weights; use engine: transformers") from error
    model.tie_weights()
    _make_buffers(model, some.device)
    model.name_or_path = str(directory)
    return model.eval()


def _make_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Buffers (the rotary frequencies) are in no checkpoint: a module that has any is made anew, off meta."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            with torch.device(device):
                model.set_submodule(name, type(module)(config=model.config))


class LoraMerge:
    """Merges the adapter of `model` into its base in place, and takes it out again exactly.

    Subtracting what was added drifts by a rounding each time, and a pristine copy doubles the memory: the touched
    weights are read back from the checkpoint in `directory`, tensor by tensor. Raises ValueError where a weight is not
    the checkpoint's to begin with, for it would be lost.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, directory: Path) -> None:
        from peft.tuners.lora import Linear

        modules = base_model(model).named_modules()
        self.layers = {name: layer for name, layer in modules if isinstance(layer, Linear)}
        # .data, so that autograd's version counters see no change: once the rollout is over there is none.
        self.weights: dict[str, Any] = {n: layer.get_base_layer().weight.data for n, layer in self.layers.items()}
        self.files = _checkpoint_files(directory)
        for name, saved in self._saved():
            if not torch.equal(self.weights[name], saved):
                raise ValueError(
                    f"{name}.weight is not what {directory} holds: LoRA in place needs the base as it was loaded"
                )

    @contextmanager
    def merged(self) -> Iterator[None]:
        try:
            with torch.no_grad():
                for name, layer in self.layers.items():
                    for adapter in layer.active_adapters:
                        self.weights[name].add_(layer.get_delta_weight(adapter))
            yield
        finally:
            for name, saved in self._saved():
                self.weights[name].copy_(saved)

    def _saved(self) -> Iterator[tuple[str, Tensor]]:
        """(layer name, the checkpoint's weight in the model's dtype), file by file."""
        from safetensors import safe_open

        for file, keys in self.files.items():
            with safe_open(file, framework="pt") as checkpoint:
                for name in [n for n in self.weights if f"{n}.weight" in keys]:
                    weight = self.weights[name]
                    yield name, checkpoint.get_tensor(f"{name}.weight").to(weight.device, weight.dtype)


def _checkpoint_files(directory: Path) -> dict[Path, set[str]]:
    from safetensors import safe_open

    files: dict[Path, set[str]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as checkpoint:
            files[path] = set(checkpoint.keys())
    return files
