"""float16 ends at 65504 and holds nothing below 6e-8, where the gradients of a loss over many tokens lie on their way
through the layers: its loss is multiplied for the backward, and the float32 gradients are divided again (Micikevicius
et al., Mixed Precision Training, 2018). Each update tries the scales anew, so that there is no state to resume."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


def loss_scales(dtype: str) -> tuple[float, ...]:
    """What to try for a model in `dtype`, the largest first. Powers of two, which round nothing."""
    return (2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0) if dtype == "float16" else (1.0,)


@torch.no_grad()
def unscale(parameters: Iterable[Tensor], scale: float) -> bool:
    """Divides the gradients by `scale`. Where they have overflowed it drops them all and returns False: they are to be
    made again at a smaller one. At 1 they are left as they are."""
    if scale == 1.0:
        return True
    with_gradient = [(p, p.grad) for p in parameters if p.grad is not None]
    finite = bool(get_total_norm([gradient for _, gradient in with_gradient]).isfinite())
    for parameter, gradient in with_gradient:
        parameter.grad = gradient.div_(scale) if finite else None
    return finite
