"""Low-rank adapters, through PEFT."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from longgrpo.config.model import LoraConfig
from longgrpo.config.run import TrainConfig
from longgrpo.errors import ConfigError
from longgrpo.model.files import PICKLES, model_config, reading
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
    if config.path:
        _load(adapted, config.path)
    return adapted


def _load(model: PeftModel, path: str) -> None:
    """The weights of a saved adapter. Raises ValueError if they are not those of this model."""
    from peft import load_peft_weights, set_peft_model_state_dict

    try:
        found: Any = set_peft_model_state_dict(model, load_peft_weights(path, device="cpu"))
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"lora.path = {path!r}: its weights do not fit this model: {error}") from error
    missing = [name for name in found.missing_keys if "lora_" in name]
    if missing or found.unexpected_keys:
        odd = [*missing, *found.unexpected_keys][0]
        raise ValueError(f"lora.path = {path!r}: its weights do not fit this model, the first that does not: {odd}")


def merge(model: PreTrainedModel, path: str) -> None:
    """Adds a saved adapter to the weights, in place: whoever shares them sees the sum. In bfloat16 it is rounded."""
    import peft

    _plain_config(path, "lora.merged")
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    peft.PeftModel.from_pretrained(model, path).merge_and_unload()
    moved = [name for name, parameter in model.named_parameters() if pointers.get(name) != parameter.data_ptr()]
    if moved:
        raise NotImplementedError(f"lora.merged: PEFT does not merge into {moved[0]} in place; export a merged model")


def with_adapter(config: TrainConfig) -> TrainConfig:
    """The config with the rank, alpha and targets of the adapter that lora.path names. Raises ConfigError if there is
    none, or it is of a kind that the trainer does not have."""
    if config.lora is None or not (config.lora.path or config.lora.merged):
        return config
    if config.lora.merged:
        if config.model.quantization:
            raise ConfigError("lora.merged needs weights that are not quantized: set model.quantization: null")
        _plain_config(config.lora.merged, "lora.merged")
    if not config.lora.path:
        return config
    saved = _plain_config(config.lora.path, "lora.path")
    targets = sorted(saved.target_modules) if isinstance(saved.target_modules, set) else saved.target_modules
    return replace(config, lora=replace(config.lora, rank=saved.r, alpha=saved.lora_alpha, targets=targets))


def _plain_config(path: str, key: str) -> Any:
    """The config of a saved adapter, which is LoRA and nothing more."""
    import peft

    directory = Path(path)
    if directory.is_dir() and not (directory / "adapter_model.safetensors").is_file():
        pickled = [file.name for pattern in PICKLES for file in directory.glob(pattern)]
        has = f"only {pickled[0]}: pickle, which is never loaded" if pickled else "no adapter_model.safetensors"
        raise ConfigError(f"{key} = {path!r}: has {has}")
    try:
        saved: Any = reading(directory / "adapter_config.json", lambda: peft.PeftConfig.from_pretrained(path))
    except ValueError as error:
        raise ConfigError(f"{key} = {path!r}: holds no adapter of PEFT: {error}") from error
    plain: dict[str, Any] = {
        "peft_type": "LORA", "bias": "none", "modules_to_save": None, "use_dora": False, "use_rslora": False,
        "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
    for name, value in plain.items():
        if (found := getattr(saved, name, value)) not in (value, None, []):
            raise ConfigError(f"{key} = {path!r}: has {name} = {found!r}, which the trainer does not train: {value!r}")
    return saved


def check_lora(directory: Path, config: LoraConfig) -> None:
    """Raises ValueError as add_lora does, before the model in `directory` is loaded."""
    add_lora(outline(directory), config, seed=0)


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
        weight = getattr(layer.get_base_layer(), "weight", None)  # experts have several, under other names
        tied = sorted({*users.get(id(weight), ())} - {name})
        if tied:
            raise ValueError(
                f"lora.targets: {name} has the weight of {', '.join(tied)} (tied), which an adapter on one of them "
                "would take apart: leave it out"
            )


def lora_layers(model: PeftModel) -> dict[str, Any]:
    """PEFT's layers with an adapter, by the names that they have in the base model."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in base_model(model).named_modules() if isinstance(module, LoraLayer)}


def outline(directory: Path) -> PreTrainedModel:
    """The model in `directory`, on meta."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(model_config(directory))
    return model


def linear_names(directory: Path) -> list[str]:
    """The last names ("q_proj", ...) of the linear layers of the model in `directory`, the head left out."""
    model = outline(directory)
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
