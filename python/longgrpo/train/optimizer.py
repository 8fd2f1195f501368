"""The optimizer that train.optimizer names."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from longgrpo.config.optimizer import OPTIMIZERS
from longgrpo.config.train import LoopConfig
from longgrpo.tasks.user_code import load_function


def make_optimizer(parameters: Iterable[Tensor], train: LoopConfig) -> torch.optim.Optimizer:
    """train.learning_rate, train.betas and train.weight_decay go to it if it has such an argument; train.optim_args
    come last. Raises ValueError for a package that is missing, for arguments and for parameters that it does not take.
    """
    parameters = list(parameters)
    cls, own = _optimizer(train.optimizer)
    known = inspect.signature(cls).parameters
    common = {"lr": train.rate, "betas": train.betas, "weight_decay": train.weight_decay}
    arguments = {name: value for name, value in common.items() if name in known} | own | train.optim_args
    try:
        optimizer: torch.optim.Optimizer = cls(parameters, **arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        given = f"train.optimizer = {train.optimizer!r} with train.optim_args = {train.optim_args}"
        if any(parameter.ndim != 2 for parameter in parameters) and train.optimizer == "muon":
            remedy = "it steps matrices only, which all parameters of an adapter are: add a lora group"
        else:
            remedy = f"{cls.__name__} takes {', '.join(name for name in known if name != 'params')}"
        raise ValueError(f"{given}: {error}; {remedy}") from error
    return optimizer


def _optimizer(name: str) -> tuple[Any, dict[str, Any]]:
    """The class, and the arguments that its name stands for."""
    if name not in OPTIMIZERS:
        return load_function(name, "train.optimizer"), {}
    module, cls, arguments, _ = OPTIMIZERS[name]
    try:
        return getattr(importlib.import_module(module), cls), arguments
    except (ImportError, AttributeError) as error:
        package = module.partition(".")[0]
        raise ValueError(
            f"train.optimizer = {name!r} needs {package} with {cls} ({error}): pip install -U {package}, or take adamw"
        ) from error
