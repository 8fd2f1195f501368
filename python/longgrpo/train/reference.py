"""The policy that the KL term holds on to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Reference:
    """Under LoRA the base without its adapter, which costs nothing. With `copy` a frozen copy of the trained weights,
    the adapter's or all: it replaces them while the reference is scored, and can be moved."""

    def __init__(self, model: Any, parameters: Mapping[str, Tensor], copy: bool) -> None:
        self._model, self._parameters = model, parameters
        self.tensors = {name: p.detach().clone() for name, p in parameters.items()} if copy else {}

    @contextmanager
    def __call__(self) -> Iterator[Any]:
        """The model as the reference; nothing may train or sample within."""
        if not self.tensors:
            with self._model.disable_adapter():
                yield self._model
            return
        self._swap()
        try:
            yield self._model
        finally:
            self._swap()

    def _swap(self) -> None:
        """Exchanges pointers: whatever shares the weights, an engine or a view, never sees the reference."""
        for name, parameter in self._parameters.items():
            parameter.data, self.tensors[name] = self.tensors[name], parameter.data

    @torch.no_grad()
    def sync(self, mixup: float) -> None:
        """reference = mixup * policy + (1 - mixup) * reference."""
        for name, parameter in self._parameters.items():
            self.tensors[name].lerp_(parameter.to(self.tensors[name].dtype), mixup)
