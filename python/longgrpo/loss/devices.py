"""Where the tensors of a call may lie: one rule for every public function.

The device is hidden's, or logp's in grpo_loss. The model's own tensors (weight, bias, ref_hidden, ref_weight) must be
there. What has one entry a token or a sequence may lie on the CPU, where a trainer makes it, and is moved.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TypeVar

import torch
from torch import Tensor

from longgrpo.loss.tokens import LossTokens

_TOKENS = tuple(field.name for field in fields(LossTokens))


Given = TypeVar("Given", Tensor, Tensor | None)


def on_device(device: torch.device, tensor: Given) -> Given:
    """`tensor` on `device`, without waiting for what the device is at."""
    if tensor is None or tensor.device == device:
        return tensor
    from_host = device.type == "cuda" and tensor.device.type == "cpu" and not torch.compiler.is_compiling()
    pinned = from_host and not tensor.requires_grad
    return (tensor.pin_memory() if pinned else tensor).to(device, non_blocking=True)


def require(like: str, device: torch.device, **tensors: Tensor | None) -> None:
    """Raises ValueError naming the first of `tensors` that does not lie on `device`, where the tensor `like` does."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and {like} on {device}: move {name} to {device}")


def bring(like: str, device: torch.device, name: str, tensor: Given) -> Given:
    """A tensor with one entry a token or a sequence, on `device`.

    Raises ValueError if it lies on another device than that or the CPU.
    """
    if tensor is not None and tensor.device.type != "cpu":
        require(like, device, **{name: tensor})
    return on_device(device, tensor)


def bring_tokens(like: str, device: torch.device, tokens: LossTokens) -> LossTokens:
    """The same for each tensor of `tokens`."""
    return LossTokens(**{name: bring(like, device, name, getattr(tokens, name)) for name in _TOKENS})
