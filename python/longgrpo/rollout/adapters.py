"""How a LoRA adapter reaches the engine, in one of three modes.

merge  the base carries the adapter during a rollout: the engine runs at its full speed. Below float32 the sum
       would round B A away, and a quantized base has no room for it.
views  PEFT's A and B are the engine's own LoRA tensors: nothing is ever copied. The engine takes only certain ranks,
       and only a scale of 1 (alpha = rank).
copy   A and B are copied into the engine's LoRA tensors after every update: any rank up to the engine's largest.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from longgrpo.config.model import LoraConfig
from longgrpo.model.lora import lora_layers

if TYPE_CHECKING:
    from peft import PeftModel

log = logging.getLogger(__name__)

Mode = Literal["merge", "views", "copy"]


class Adapter(Protocol):
    def publish(self) -> int:
        """Makes the engine use the adapter's present weights. Returns the bytes that were copied."""

    def in_engine(self) -> AbstractContextManager[None]:
        """The context in which a rollout runs."""


def choose_mode(
    lora: LoraConfig, *, mergeable: bool, ranks: Sequence[int], slots: str = "", bitwise: bool = False
) -> Mode:
    """The mode to use: lora.mode, or the fastest safe one, which one log line names.

    `mergeable`: the base is in float32. `ranks`: those of the engine's own LoRA tensors. `slots`: why none of them can
    be used. `bitwise`: the engine's sums are to be the trainer's. Raises ValueError for a mode that is not possible.
    """
    obstacles = _obstacles(lora, mergeable, ranks, slots)
    if bitwise:
        obstacles |= _not_bitwise(lora, ranks, obstacles)
    if lora.mode != "auto":
        if obstacle := obstacles[lora.mode]:
            raise ValueError(f"lora.mode = {lora.mode}: {obstacle}")
        return lora.mode
    refused = dict(takewhile(lambda item: item[1], obstacles.items()))
    reasons = "; ".join(f"not {mode}: {obstacle}" for mode, obstacle in refused.items())
    if len(refused) == len(obstacles):
        raise ValueError(f"lora.mode = auto finds no way into the engine: {reasons}")
    mode = list(obstacles)[len(refused)]
    log.info("lora.mode: %s%s", mode, f" ({reasons})" if reasons else "")
    return mode


def _obstacles(lora: LoraConfig, mergeable: bool, ranks: Sequence[int], slots: str) -> dict[Mode, str]:
    """Why each mode is not possible ("": it is), the fastest mode first."""
    merge = "" if mergeable else "B A would be rounded away in a base below float32"
    if lora.merged:
        merge = "the base is read back from the checkpoint after each rollout, and lora.merged has changed it"
    views = ""
    if lora.rank not in ranks:
        views = f"the engine's own tensors have rank {', '.join(map(str, ranks))}, lora.rank is {lora.rank}"
    elif lora.alpha != lora.rank:
        views = f"the engine has no scale of its own, so lora.alpha = {lora.alpha} must be lora.rank = {lora.rank}"
    copy = "" if lora.rank <= max(ranks) else f"lora.rank = {lora.rank}, and the engine takes at most {max(ranks)}"
    return {"merge": merge, "views": slots or views, "copy": slots or copy}


def _not_bitwise(lora: LoraConfig, ranks: Sequence[int], obstacles: Mapping[Mode, str]) -> dict[Mode, str]:
    """The obstacles that rollout.bitwise adds."""
    found: dict[Mode, str] = {"merge": "rollout.bitwise: a merged base is rounded where W x + B A x is not"}
    if lora.rank not in ranks:  # the engine's zeros would be summed with it, and may change the order
        found["copy"] = f"rollout.bitwise: lora.rank must be one of {', '.join(map(str, ranks))}, not {lora.rank}"
    return {mode: obstacles[mode] or text for mode, text in found.items()}


class LoraSlots:
    """The adapter in the engine's own LoRA tensors, `slots`: module name -> A [R, in] and B [out, R], R >= the rank.

    With `views`, A and B of `model` become those tensors; else publish() copies them, B times the scale.
    Raises NotImplementedError for a module that the engine cannot adapt.
    """

    def __init__(self, model: PeftModel, slots: Mapping[str, tuple[Tensor, Tensor]], *, views: bool) -> None:
        self.pairs: list[tuple[Any, str, Tensor, Tensor]] = []  # PEFT's layer, its adapter, A and B of the engine
        for a, b in slots.values():
            a.zero_(), b.zero_()  # of an adapter that was here before
        for name, layer in lora_layers(model).items():
            if name not in slots:
                raise NotImplementedError(f"the engine has no LoRA on {name}: leave it out of lora.targets")
            (adapter,) = layer.active_adapters
            rank = layer.r[adapter]
            self.pairs.append((layer, adapter, slots[name][0][:rank], slots[name][1][:, :rank]))
        self.publish()
        if views:
            for layer, adapter, a, b in self.pairs:
                layer.lora_A[adapter].weight = nn.Parameter(a)
                layer.lora_B[adapter].weight = nn.Parameter(b)
            self.pairs = []

    @torch.no_grad()
    def publish(self) -> int:
        for layer, adapter, a, b in self.pairs:
            a.copy_(layer.lora_A[adapter].weight)
            b.copy_(layer.lora_B[adapter].weight * layer.scaling[adapter])
        return sum(a.nbytes + b.nbytes for _, _, a, b in self.pairs)

    def in_engine(self) -> AbstractContextManager[None]:
        return nullcontext()


class LoraMerge:
    """The adapter of `model`, merged into its base in place while a rollout lasts, and taken out again exactly.

    Subtracting what was added drifts by a rounding each time, and a pristine copy doubles the memory: the touched
    weights are read back from the checkpoint in `directory`, tensor by tensor. Raises ValueError if a weight is not
    the checkpoint's to begin with, for it would be lost.
    """

    def __init__(self, model: PeftModel, directory: Path) -> None:
        self.layers = lora_layers(model)
        # .data, so that autograd's version counters see no change: once the rollout is over there is none.
        self.weights: dict[str, Any] = {n: layer.get_base_layer().weight.data for n, layer in self.layers.items()}
        self.files = _checkpoint_files(directory)
        for name, saved in self._saved():
            if not torch.equal(self.weights[name], saved):
                raise ValueError(
                    f"{name}.weight is not what {directory} holds: LoRA in place needs the base as it was loaded"
                )

    def publish(self) -> int:
        return 0

    @contextmanager
    def in_engine(self) -> Iterator[None]:
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
