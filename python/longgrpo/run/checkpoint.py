"""Checkpoints: written next to their place and renamed into it, so that what was saved stays whole.

RUN/checkpoints/step-000025/  state.safetensors  trained weights and the optimizer's state, by parameter name
                              state.json         step, metric, position in the data, random generators, the summary's
                              adapter/           with LoRA: the adapter as peft reads it
                              SHA256SUMS         of these files, as `sha256sum -c SHA256SUMS` reads it

A name `.step-...` is something half done: a process that was killed left it, the next save removes it. Any other name
is not a checkpoint's and is left alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from longgrpo.errors import UserError
from longgrpo.run.files import read_json, remove_directory, replace_directory
from longgrpo.run.shards import WHOLE, Shards

log = logging.getLogger(__name__)

WEIGHT = "weight"
SUMS = "SHA256SUMS"
_NAME = re.compile(r"step-(\d{6,})")
_HALF_DONE = re.compile(r"\.step-\d{6,}\.(tmp|old)")


def save(
    run: Path,
    step: int,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    write_adapter: Callable[[Path], None] | None,
    keep: int,
    metric: float | None = None,
    shards: Shards = WHOLE,
) -> Path:
    """Saves everything that the steps after `step` depend on, then drops all but the newest `keep` checkpoints and the
    one with the highest `metric`.

    The checkpoint of a step is written once: replacing it would leave a moment without it.
    """
    directory = run / "checkpoints" / f"step-{step:06d}"
    tensors: dict[str, Tensor] = {f"{WEIGHT}.{name}": parameter for name, parameter in parameters.items()}
    numbers: dict[str, dict[str, Any]] = {}
    moments: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                moments[f"{key}.{name}"] = value
            else:
                numbers.setdefault(name, {})[key] = value
    tensors, moments, numbers = shards.collect(tensors), shards.collect(moments), shards.merge(numbers)
    if not shards.ranks.is_first:
        return directory

    def write(directory: Path) -> None:
        save_file(_apart(tensors | moments), directory / "state.safetensors")
        own = {"optimizer": {"class": type(optimizer).__name__, "numbers": numbers, "tensors": sorted(moments)}}
        (directory / "state.json").write_text(json.dumps({"step": step, "metric": metric, **own, **state}))
        if write_adapter:
            write_adapter(directory / "adapter")
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        (directory / SUMS).write_text("".join(f"{_sha256(path)}  {path.relative_to(directory)}\n" for path in files))

    if not directory.is_dir():
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
    for path in (run / "checkpoints").iterdir():
        if _HALF_DONE.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    kept = {*checkpoints(run)[-keep:], best(run)}
    for directory in checkpoints(run):
        if directory not in kept:
            remove_directory(directory)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in paths if _NAME.fullmatch(path.name) and path.is_dir()), key=step_of)


def best(run: Path) -> Path | None:
    """The checkpoint that was saved with the highest metric, of several the oldest; None if none has one. A checkpoint
    that cannot be read is none of them."""
    known: dict[Path, float] = {}
    for directory in checkpoints(run):
        try:
            metric = read_state(directory)["metric"]
        except UserError as error:
            log.warning("%s", error)
            continue
        if isinstance(metric, int | float):
            known[directory] = metric
    return max(known, key=lambda directory: known[directory]) if known else None


def find(run: Path, which: str) -> Path:
    """The checkpoint of `run` called "last", "best" (see save) or by its step. Raises UserError if there is none."""
    saved = checkpoints(run)
    found = {str(step_of(directory)): directory for directory in saved}
    if saved:
        found["last"] = saved[-1]
    if (highest := best(run)) is not None:
        found["best"] = highest
    if which not in found:
        raise UserError(f"{run} has no checkpoint {which!r}; it has {', '.join(found) or 'none'}")
    return found[which]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def damage(directory: Path) -> str:
    """What is wrong with the files of a checkpoint, by their checksums; "" if nothing is. One that was saved before
    there were checksums has none to compare with."""
    sums = directory / SUMS
    if not sums.is_file():
        log.warning("%s: was saved without checksums, and is read unchecked", directory)
        return ""
    try:
        lines = [line.split("  ", 1) for line in sums.read_text().splitlines()]
        for digest, name in lines:
            path = directory / name
            if ".." in Path(name).parts or not path.is_file() or not path.is_relative_to(directory):
                return f"{name} is missing"
            if _sha256(path) != digest:
                return f"{name} is not as it was saved (its SHA-256 is another)"
        return "" if {"state.json", "state.safetensors"} <= {name for _, name in lines} else f"{SUMS} is cut off"
    except (OSError, ValueError) as error:
        return str(error)


def verify(directory: Path) -> None:
    """Raises UserError for a checkpoint that is damaged, and offers the one before it."""
    if found := damage(directory):
        raise _damaged(directory, found)


def _damaged(directory: Path, what: object) -> UserError:
    if not directory.is_dir():
        return UserError(
            f"{directory}: was removed while it was read: the run goes on, and keeps the newest; try again"
        )
    earlier = [path for path in checkpoints(directory.parents[1]) if step_of(path) < step_of(directory)]
    whole = next((path for path in reversed(earlier) if not damage(path)), None)
    after = f"then {whole.name} is the last, and whole" if whole else "there is no whole one before it"
    return UserError(
        f"{directory}: cannot be read ({what}); to go on from the checkpoint before it, move this one away: "
        f"mv {directory} {directory}.damaged ({after})"
    )


def read_state(directory: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors. Raises UserError if it cannot be read."""
    state = read_json(directory / "state.json", "the checkpoint is damaged")
    if not isinstance(state, dict) or not {"step", "metric"} <= state.keys():
        raise UserError(f"{directory / 'state.json'}: is not the state of a run; the checkpoint is damaged")
    return state


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """What state.safetensors holds: "weight.NAME" and "KEY.NAME" of the optimizer's state, of every parameter."""
    verify(directory)
    try:
        return load_file(directory / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise _damaged(directory, error) from error


def load(
    directory: Path, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, shards: Shards = WHOLE
) -> dict[str, Any]:
    """Copies a checkpoint, which rank 0 reads, into the parameters and the optimizer, in place; returns the rest of its
    state.

    Raises UserError, before anything is changed, if the checkpoint cannot be read or was saved from other weights.
    """

    def read() -> tuple[dict[str, Any], dict[str, Tensor]]:
        saved, state = read_tensors(directory), read_state(directory)
        if lost := sorted(set(state.get("optimizer", {}).get("tensors", ())) - set(saved)):
            raise _damaged(directory, f"the optimizer's {lost[0]} is missing in state.safetensors")
        _check_weights(directory, saved, parameters)
        return state, saved

    state, saved = shards.distribute(read)
    kept = state.pop("optimizer", {})
    _copy_weights(saved, parameters)
    _load_optimizer(optimizer, kept, saved, parameters)
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


def load_weights(directory: Path, saved: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Copies the weights among the `saved` tensors of a checkpoint into the parameters, in place, all or none."""
    _check_weights(directory, saved, parameters)
    _copy_weights(saved, parameters)


def _check_weights(directory: Path, saved: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    names = {name.removeprefix(f"{WEIGHT}.") for name in saved if name.startswith(f"{WEIGHT}.")}
    if names != set(parameters):
        odd = sorted(names ^ set(parameters))
        raise UserError(
            f"{directory}: was saved from other weights (first difference: {odd[0]}); model and lora must not change"
        )
    weights = {name: saved[f"{WEIGHT}.{name}"] for name in parameters}
    for name, parameter in parameters.items():
        if weights[name].shape != parameter.shape:
            raise UserError(
                f"{directory}: {name} was saved as {list(weights[name].shape)}, now {list(parameter.shape)}: "
                "model and lora must not change"
            )


@torch.no_grad()
def _copy_weights(saved: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        if f"{WEIGHT}.{name}" in saved:  # else another rank has it, and hands it on
            parameter.copy_(saved[f"{WEIGHT}.{name}"])
