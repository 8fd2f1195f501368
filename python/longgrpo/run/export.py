"""A run's weights in the forms that others load: an adapter for PEFT and vLLM, a model for transformers and vLLM, a
GGUF file for llama.cpp and Ollama."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from longgrpo.config.model import Dtype
from longgrpo.config.run import TrainConfig, load_config
from longgrpo.errors import ConfigError
from longgrpo.model.load import gguf_of, load_model, load_tokenizer, resolve_model
from longgrpo.run import checkpoint
from longgrpo.run.card import summary_at, write_card
from longgrpo.run.files import replace_directory, sync, writing

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GGUFType = Literal["bfloat16", "q8_0"]
Form = Literal["adapter", "model", "gguf"]


def default_form(config: TrainConfig) -> Form:
    """What is smaller and says the same: the adapter, if there is one."""
    return "adapter" if config.lora else "model"


def export(
    run: Path, directory: Path, form: Form | None = None, which: str = "last", dtype: Dtype | GGUFType | None = None
) -> Path:
    """Writes the weights of a checkpoint of `run` into `directory`, with all that their loaders ask for; returns the
    checkpoint.

    form: "adapter" as PEFT keeps it; "model", the whole model in safetensors, under LoRA with the adapter merged into
    it; "gguf", the same as one file, `directory` itself if its name ends so. Default: adapter if the run has one, else
    model. which: see checkpoint.find. dtype: of a model, default model.dtype; of a gguf bfloat16, the default, or
    q8_0. The adapter is merged in float32 and the sum rounded once. Raises ConfigError if the run has no adapter, if
    its model is quantized and cannot be merged with the adapter, if the form cannot say the model, if `directory`
    exists already, and as find does.
    """
    config = load_config(run / "config.yaml")
    saved = checkpoint.find(run, which)
    if directory.exists():
        raise ConfigError(f"{directory} exists already: name a new directory")
    form = form or default_form(config)
    if (dtype == "q8_0" and form != "gguf") or (form == "gguf" and dtype not in (None, "bfloat16", "q8_0")):
        raise ConfigError(f"--dtype {dtype} of a {form}: a gguf takes bfloat16 and q8_0, a model the types of torch")
    checkpoint.verify(saved)
    step = checkpoint.step_of(saved)
    carded = partial(write_card, config=config, step=step, summary=summary_at(run, step))
    if form == "adapter":
        if not config.lora:
            raise ConfigError(f"{run} trained all weights and has no adapter: export it as a model")
        replace_directory(directory, lambda path: _copy(saved / "adapter", path, carded), new=True)
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
    tokenizer = load_tokenizer(base, config.task.chat_template)
    if form == "gguf":
        _write_gguf(model, tokenizer, directory, "q8_0" if dtype == "q8_0" else "bfloat16", gguf_of(config.model.path))
        return saved
    model.to(getattr(torch, dtype or config.model.dtype))

    def write(path: Path) -> None:
        write_model(model, tokenizer, path)
        carded(path)

    replace_directory(directory, write, new=True)
    return saved


def _write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, target: Path, kind: GGUFType, source: Path | None
) -> None:
    """source: the GGUF file that the base came from."""
    from longgrpo.model.to_gguf import write_gguf

    file = target if target.suffix == ".gguf" else target / "model.gguf"
    temporary = file.with_name(f".{file.name}.tmp")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with writing(file):
            write_gguf(model, tokenizer, temporary, kind, source)
            sync(temporary)
            os.replace(temporary, file)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)
        if file.parent == target and not file.exists():
            target.rmdir()


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """The model and its tokenizer as from_pretrained loads them."""
    # Each with storage of its own: an engine's are parts of fused ones, which safetensors would write whole.
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.save_pretrained(directory, state_dict=weights)
    tokenizer.save_pretrained(directory)


def _copy(source: Path, directory: Path, then: Callable[[Path], None]) -> None:
    shutil.copytree(source, directory, dirs_exist_ok=True)
    then(directory)
