"""A model's files, looked at before a library loads them: what is missing or damaged is named, and nothing is run.

Weights come from safetensors only, and code from a model's repository is never run: LOCAL goes with every call of
transformers that could ask for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
AGAIN = "download the model again"

Loaded = TypeVar("Loaded")


def model_config(directory: Path) -> Any:
    """transformers' config of the model in `directory`. Raises ValueError if there is none."""
    from transformers import AutoConfig

    return reading(directory / "config.json", lambda: AutoConfig.from_pretrained(directory, **LOCAL))


def reading(path: Path, load: Callable[[], Loaded]) -> Loaded:
    """load(), whose errors become a ValueError that names `path`: the libraries raise of every kind, down to plain
    Exception."""
    try:
        return load()
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{path}: asks for code from the model's own repository (auto_map), which is never run: take a model "
                "that transformers knows by itself"
            ) from error
        if isinstance(error, ValueError) and str(path) in str(error):
            raise  # it says all of this itself
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}: {error}); {AGAIN}") from error


def check_weight_files(directory: Path) -> None:
    """Raises ValueError, naming the file, for weights that are pickled, missing, cut off or none at all."""
    for path in weight_files(directory):
        from safetensors import safe_open

        def names(path: Path = path) -> None:
            with safe_open(path, framework="pt") as file:
                list(file.keys())

        reading(path, names)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors that hold the weights. Raises ValueError as check_weight_files does, before they are opened."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        tree = reading(index, lambda: json.loads(index.read_bytes()))
        names = tree.get("weight_map") if isinstance(tree, dict) else None
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"{index}: has no weight_map; {AGAIN}")
        shards = sorted(set(names.values()))
        for name in shards:
            if not name.endswith(".safetensors") or Path(name).name != name:
                raise ValueError(f"{index}: names {name!r}, and only safetensors beside it are loaded")
        if missing := [name for name in shards if not (directory / name).is_file()]:
            raise ValueError(f"{index}: names {', '.join(missing)}, which is not there; {AGAIN}")
        return [directory / name for name in shards]
    found = sorted(directory.glob("*.safetensors"))
    if not found:
        pickled = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
        what = f"only {', '.join(pickled[:3])}: pickle, which is never loaded" if pickled else "no safetensors"
        raise ValueError(f"{directory}: its weights cannot be read, it has {what}; take the model in safetensors")
    return found


def check_finite(model: torch.nn.Module, path: str) -> None:
    """Raises ValueError, naming the first, if weights are NaN or infinite."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point() and not parameter.isfinite().all():
                raise ValueError(
                    f"model.path = {path!r}: the weights of {name} are not finite (NaN or infinity): the model is "
                    f"damaged, or does not fit into model.dtype; {AGAIN}, or set model.dtype: float32"
                )
