"""float32 copies of parameters below float32, for the optimizer: a bfloat16 weight has 8 bits, and an update of less
than 2^-9 of it would round to nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BUCKET = 1 << 27  # bytes that one collective of the ranks moves: its buffer comes beside the gradients


def balanced(sizes: Sequence[int], parts: int) -> list[int]:
    """Of each size its part: the largest first, each to the part that has the least so far."""
    loads, found = [0] * parts, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        found[i] = loads.index(min(loads))
        loads[found[i]] += sizes[i]
    return found


class MasterWeights:
    """`parameters`: what the optimizer is to step, by name, in float32: a master if the parameter is below it, else
    the parameter itself.

    A master takes over its parameter's gradient, micro-batch by micro-batch, so that the sum is in float32 as well.
    publish() rounds the masters into the parameters, in place: whoever shares their storage sees it.

    With `owned` only the parameters of these names are stepped here and get a master; the others are of other ranks,
    and only their gradients are added up. With `take` no gradient is added up here: take(name, gradient) has it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        owned: Collection[str] | None = None,
        take: Callable[[str, Tensor], None] | None = None,
    ) -> None:
        self.parameters: dict[str, Tensor] = {}
        self.holders: dict[str, Any] = {}
        """What holds the gradient of each parameter, owned or not, as .grad: float32, or None."""
        self._rounded: list[tuple[Tensor, Tensor]] = []  # a parameter and its master
        for name, parameter in parameters.items():
            holder: Any = parameter
            own = owned is None or name in owned
            if parameter.dtype != torch.float32:
                holder = nn.Parameter(parameter.detach().float()) if own else _Gradient()
            if take:
                parameter.register_post_accumulate_grad_hook(_Taken(name, take))
            elif holder is not parameter:
                parameter.register_post_accumulate_grad_hook(_Handover(holder))
            if own and holder is not parameter:
                self._rounded.append((parameter, holder))
            if own:
                self.parameters[name] = holder
            self.holders[name] = holder

    @torch.no_grad()
    def publish(self) -> None:
        for parameter, master in self._rounded:
            parameter.copy_(master)


class _Gradient:
    """Holds the gradient of a parameter without a master."""

    grad: Tensor | None = None


class _Handover:
    """Adds a parameter's gradient to its master's, and leaves it none."""

    def __init__(self, master: nn.Parameter | _Gradient) -> None:
        self.master = master

    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        parameter.grad = None
        self.master.grad = gradient if self.master.grad is None else self.master.grad.add_(gradient)


class _Taken:
    """Hands a parameter's gradient over, and leaves it none."""

    def __init__(self, name: str, take: Callable[[str, Tensor], None]) -> None:
        self.name, self.take = name, take

    def __call__(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        self.take(self.name, gradient)
