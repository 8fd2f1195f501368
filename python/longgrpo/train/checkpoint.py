"""Checkpoints: written beside their place and renamed into it, so that what was saved stays whole.

RUN/checkpoints/step-000025/  state.safetensors  trained weights and AdamW's moments, by parameter name
                              state.json         step, position in the data, random generators, what the summary needs
                              adapter/           with LoRA: the adapter as peft reads it
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longgrpo.train.errors import UserError

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def replace_directory(directory: Path, write: Callable[[Path], None]) -> None:
    """Writes a directory by `write(temporary)` and renames it to `directory`, whose old content stays until then."""
    temporary, old = (directory.with_name(f".{directory.name}.{suffix}") for suffix in ("tmp", "old"))
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write(temporary)
        for path in temporary.rglob("*"):
            _sync(path)
        if directory.exists():
            os.rename(directory, old)
        os.rename(temporary, directory)
        _sync(directory.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_file(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    _sync(temporary)
    os.replace(temporary, path)


def save(
    run: Path,
    step: int,
    parameters: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    write_adapter: Callable[[Path], None] | None,
    keep: int,
) -> Path:
    """Saves everything that the steps after `step` depend on, then drops all but the newest `keep` checkpoints.

    The checkpoint of a step is written once: replacing it would leave a moment without it.
    """
    directory = run / "checkpoints" / f"step-{step:06d}"
    if directory.exists():
        return directory
    tensors = {f"weight.{name}": parameter for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        moments = optimizer.state.get(parameter, {})
        tensors |= {f"{moment}.{name}": moments[moment] for moment in MOMENTS if moment in moments}

    def write(directory: Path) -> None:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, directory / "state.safetensors"
        )
        (directory / "state.json").write_text(json.dumps({"step": step, **state}))
        if write_adapter:
            write_adapter(directory / "adapter")

    replace_directory(directory, write)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return directory


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def load(run: Path, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies the newest checkpoint into the parameters and the optimiser, in place; returns the rest of its state."""
    if not checkpoints(run):
        raise UserError(f"{run}: has no checkpoint to resume from; start the run again from its config")
    directory = checkpoints(run)[-1]
    tensors = load_file(directory / "state.safetensors")
    saved = {name.removeprefix("weight.") for name in tensors if name.startswith("weight.")}
    if saved != set(parameters):
        odd = sorted(saved ^ set(parameters))
        raise UserError(
            f"{directory}: was saved from other weights (first difference: {odd[0]}); model and lora must not change"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            weight = tensors[f"weight.{name}"]
            if weight.shape != parameter.shape:
                raise UserError(
                    f"{directory}: {name} was saved as {list(weight.shape)}, now {list(parameter.shape)}: "
                    "model and lora must not change"
                )
            parameter.copy_(weight)
            moments = {moment: tensors.get(f"{moment}.{name}") for moment in MOMENTS}
            if moments["step"] is not None:
                optimizer.state[parameter] = {
                    m: t if m == "step" else t.to(parameter.device) for m, t in moments.items() if t is not None
                }
    return json.loads((directory / "state.json").read_text())


def generator_states() -> dict[str, Any]:
    """The global random generators, as plain values: our steps draw from none, a user's reward function may."""
    version, keys, gauss = random.getstate()
    name, array, *rest = numpy.random.get_state(legacy=True)
    return {
        "python": [version, list(keys), gauss],
        "numpy": [name, numpy.asarray(array).tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
    }


def set_generator_states(states: dict[str, Any]) -> None:
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    numpy.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
