"""Checkpoints: written next to their place and renamed into it, so that what was saved stays whole.

RUN/checkpoints/step-000025/  state.safetensors  trained weights and the optimizer's state, by parameter name
                              state.json         step, metric, position in the data, random generators, the summary's
                              adapter/           with LoRA: the adapter as peft reads it

A name that begins with a dot is something half done: a process that was killed left it, the next save removes it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from longgrpo.errors import UserError

log = logging.getLogger(__name__)

WEIGHT = "weight"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the error of a disk that is full or fails into one that the command line reports."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: cannot be written ({error}); what was saved before is kept: make room, then resume"
        ) from error


def replace_directory(directory: Path, write: Callable[[Path], None]) -> None:
    """Writes a directory by `write(temporary)` and renames it to `directory`, whose old content stays until then.

    Raises UserError if it cannot be written.
    """
    temporary, old = (directory.with_name(f".{directory.name}.{suffix}") for suffix in ("tmp", "old"))
    if old.exists() and not directory.exists():  # killed between the two renames below
        os.rename(old, directory)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with writing(directory):
            temporary.mkdir(parents=True)
            write(temporary)
            for path in (temporary, *temporary.rglob("*")):
                _sync(path)
            if directory.exists():
                os.rename(directory, old)
            os.rename(temporary, directory)
            _sync(directory.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(directory: Path) -> None:
    """Removes a directory whole or not at all, as others see it."""
    doomed = directory.with_name(f".{directory.name}.old")
    os.rename(directory, doomed)
    shutil.rmtree(doomed)


def write_file(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            temporary.write_text(text)
            _sync(temporary)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save(
    run: Path,
    step: int,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    write_adapter: Callable[[Path], None] | None,
    keep: int,
    metric: float | None = None,
) -> Path:
    """Saves everything that the steps after `step` depend on, then drops all but the newest `keep` checkpoints and the
    one with the highest `metric`.

    The checkpoint of a step is written once: replacing it would leave a moment without it.
    """
    directory = run / "checkpoints" / f"step-{step:06d}"
    tensors = {f"{WEIGHT}.{name}": parameter for name, parameter in parameters.items()}
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{key}.{name}"] = value
            else:
                numbers.setdefault(name, {})[key] = value

    def write(directory: Path) -> None:
        save_file(_apart(tensors), directory / "state.safetensors")
        own = {"optimizer": {"class": type(optimizer).__name__, "numbers": numbers}}
        (directory / "state.json").write_text(json.dumps({"step": step, "metric": metric, **own, **state}))
        if write_adapter:
            write_adapter(directory / "adapter")

    if not directory.exists():
        replace_directory(directory, write)
    _drop_old(run, keep)
    return directory


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them, each with storage of its own: some optimizers share a table."""
    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own[name] = tensor.detach().clone() if tensor.data_ptr() in seen else tensor.detach().contiguous()
        seen.add(tensor.data_ptr())
    return own


def _drop_old(run: Path, keep: int) -> None:
    for half_done in (run / "checkpoints").glob(".*"):
        shutil.rmtree(half_done)
    kept = {*checkpoints(run)[-keep:], best(run)}
    for directory in checkpoints(run):
        if directory not in kept:
            remove_directory(directory)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def best(run: Path) -> Path | None:
    """The checkpoint that was saved with the highest metric, of several the oldest; None if none has one."""
    metrics = {directory: read_state(directory)["metric"] for directory in checkpoints(run)}
    known = {directory: metric for directory, metric in metrics.items() if metric is not None}
    return max(known, key=lambda directory: known[directory]) if known else None


def find(run: Path, which: str) -> Path:
    """The checkpoint of `run` called "last", "best" (see save) or by its step. Raises UserError if there is none."""
    saved = checkpoints(run)
    found = {str(int(directory.name.removeprefix("step-"))): directory for directory in saved}
    if saved:
        found["last"] = saved[-1]
    if (highest := best(run)) is not None:
        found["best"] = highest
    if which not in found:
        raise UserError(f"{run} has no checkpoint {which!r}; it has {', '.join(found) or 'none'}")
    return found[which]


def read_state(directory: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors."""
    state: dict[str, Any] = json.loads((directory / "state.json").read_text())
    return state


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """What state.safetensors holds: "weight.NAME" and "KEY.NAME" of the optimizer's state, of every parameter."""
    try:
        return load_file(directory / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{directory}: cannot be read ({error}); move it away to resume from the checkpoint before it"
        ) from error


def load(directory: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Copies a checkpoint into the parameters and the optimizer, in place; returns the rest of its state.

    Raises UserError if the checkpoint cannot be read or was saved from other weights.
    """
    saved, state = read_tensors(directory), read_state(directory)
    load_weights(directory, saved, parameters)
    _load_optimizer(optimizer, state.pop("optimizer", {}), saved, parameters)
    return state


def _load_optimizer(
    optimizer: torch.optim.Optimizer,
    kept: Mapping[str, Any],
    saved: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
) -> None:
    """The optimizer's state from the tensors and numbers of a checkpoint; another optimizer begins anew."""
    cls = kept.get("class", "AdamW")
    if cls != type(optimizer).__name__:
        log.warning("the checkpoint has the state of %s: %s begins without", cls, type(optimizer).__name__)
        return
    state: dict[str, dict[str, Any]] = {name: dict(numbers) for name, numbers in kept.get("numbers", {}).items()}
    for full, tensor in saved.items():
        key, _, name = full.partition(".")
        if key != WEIGHT:
            state.setdefault(name, {})[key] = tensor
    if not state:
        return
    names = {id(parameter): name for name, parameter in parameters.items()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    fresh = optimizer.state_dict()["param_groups"]
    # Its own loader knows which of its values stay in host memory, and in which type.
    optimizer.load_state_dict(
        {"state": {i: state[name] for i, name in enumerate(order) if name in state}, "param_groups": fresh}
    )


@torch.no_grad()
def load_weights(directory: Path, saved: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Copies the weights among the `saved` tensors of a checkpoint into the parameters, in place."""
    names = {name.removeprefix(f"{WEIGHT}.") for name in saved if name.startswith(f"{WEIGHT}.")}
    if names != set(parameters):
        odd = sorted(names ^ set(parameters))
        raise UserError(
            f"{directory}: was saved from other weights (first difference: {odd[0]}); model and lora must not change"
        )
    for name, parameter in parameters.items():
        weight = saved[f"{WEIGHT}.{name}"]
        if weight.shape != parameter.shape:
            raise UserError(
                f"{directory}: {name} was saved as {list(weight.shape)}, now {list(parameter.shape)}: "
                "model and lora must not change"
            )
        parameter.copy_(weight)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
