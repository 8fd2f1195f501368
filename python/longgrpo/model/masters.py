"""float32 copies of parameters below float32, for the optimizer: a bfloat16 weight has 8 bits, and an update of less
than 2^-9 of it would round to nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class MasterWeights:
    """`parameters`: what the optimizer is to step, by name, in float32: a master if the parameter is below it, else
    the parameter itself.

    A master takes over its parameter's gradient, micro-batch by micro-batch, so that the sum is in float32 as well.
    publish() rounds the masters into the parameters, in place: whoever shares their storage sees it.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters: dict[str, Tensor] = {}
        self._rounded: list[tuple[Tensor, Tensor]] = []  # a parameter and its master
        for name, parameter in parameters.items():
            master = parameter
            if parameter.dtype != torch.float32:
                master = nn.Parameter(parameter.detach().float())
                parameter.register_post_accumulate_grad_hook(_Handover(master))
                self._rounded.append((parameter, master))
            self.parameters[name] = master

    @torch.no_grad()
    def publish(self) -> None:
        for parameter, master in self._rounded:
            parameter.copy_(master)


class _Handover:
    """Adds a parameter's gradient to its master's, and leaves it none."""

    def __init__(self, master: nn.Parameter) -> None:
        self.master = master

    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        parameter.grad = None
        self.master.grad = gradient if self.master.grad is None else self.master.grad.add_(gradient)
