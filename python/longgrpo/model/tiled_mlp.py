"""Sequence-tiled MLP: the MLP of a decoder layer, a few rows at a time, with exact gradients.

    forward    y[i] = mlp(x[i])                          for each tile i of `rows` tokens, without a graph
    backward   dx[i], dW += gradients of mlp(x[i]), dy[i]  for each tile again, with one

so that the 3 I T elements of intermediates (I the MLP's width, T tokens) become 3 I rows, and x is all that is kept. An
MLP acts on each token by itself, so y and dx are those of the whole; a weight's gradient is the sum over tiles, in fp32
where weights are narrower.

Two autograd nodes save one recompute: `_Input` saves x before the MLP runs and does all of the backward, `_Output` runs
the MLP and passes dy on. A surrounding checkpoint ends its recompute at the last tensor that was saved, which is x, and
so never runs the MLP a third time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def tile_mlp(model: Model, rows: int | None = None) -> Model:
    """Switches the MLPs of a transformers model (or its PEFT wrapper) to `rows` tokens at a time, in place.

    Args:
        model: its modules called `mlp`, which take hidden states [..., H] and return [..., H]. Mixtures of experts,
            whose experts see the tokens of a whole batch, are left as they are, with a warning.
        rows: tokens of a tile; None takes H, which keeps the matmuls large and the intermediates at 3 I H elements.

    Raises:
        ValueError: rows < 1, no MLP that can be tiled, or an MLP with dropout.
    """
    if rows is not None and rows < 1:
        raise ValueError(f"rows must be >= 1, not {rows}")
    found = [(name, module) for name, module in model.named_modules() if name.rpartition(".")[2] == "mlp"]
    dense = [(name, module) for name, module in found if not _is_mixture(module)]
    if len(dense) < len(found):
        warnings.warn(f"tiled_mlp: {len(found) - len(dense)} mixture-of-experts layers are left as they are")
    if not dense:
        raise ValueError(f"tiled_mlp: {type(model).__name__} has no module called 'mlp' that can be tiled")
    for name, module in dense:
        dropout = [child.p for child in module.modules() if isinstance(child, nn.Dropout) and child.p > 0]
        if dropout:
            raise ValueError(f"tiled_mlp: {name} has dropout {dropout[0]}, which a recompute draws again: set it to 0")
        untile_mlp(module)
        module.forward = _Tiled(module, rows)
    return model


def tile_norms(model: Model, rows: int | None = None) -> Model:
    """The same for the RMS norms, in place: they keep their input in its own dtype, and what they compute in fp32 is of
    one tile. A norm over less than H, such as that of a head, takes more rows: the tile has as many elements."""
    norms: list[Any] = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    hidden = max((norm.weight.numel() for norm in norms), default=0)
    for norm in norms:
        untile_mlp(norm)
        norm.forward = _Tiled(norm, (rows or hidden) * hidden // norm.weight.numel())
    return model


def untile_mlp(model: nn.Module) -> None:
    """Undoes `tile_mlp` and `tile_norms`."""
    for module in model.modules():
        if isinstance(module.__dict__.get("forward"), _Tiled):
            del module.forward


def _is_mixture(module: nn.Module) -> bool:
    return hasattr(module, "experts") or hasattr(module, "router")


class _Tiled:
    """The forward of a tiled MLP."""

    def __init__(self, module: nn.Module, rows: int | None) -> None:
        self.mlp: Callable[[Tensor], Tensor] = module.forward
        self.module, self.rows = module, rows

    def __call__(self, x: Tensor) -> Tensor:
        rows = self.rows or x.shape[-1]
        if x.numel() <= rows * x.shape[-1]:
            return self.mlp(x)
        weights = [p for p in self.module.parameters() if p.requires_grad]
        flat = x.reshape(-1, x.shape[-1])  # [T, H]
        return _output(_input(flat, self.mlp, rows, *weights), self.mlp, rows).view(x.shape)


class _Input(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: Any, rows: int, *weights: Tensor) -> Tensor:
        ctx.mlp, ctx.rows, ctx.weights = mlp, rows, weights
        ctx.autocast = autocast_of(x)
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        dx, totals = tiled_gradients(
            lambda tile: [ctx.mlp(tile)], x, ctx.weights, [dy], ctx.rows, ctx.autocast, ctx.needs_input_grad[0]
        )
        return dx, None, None, *totals


def tiled_gradients(
    run: Callable[[Tensor], Sequence[Tensor]],
    x: Tensor,  # [..., T, H]
    weights: Sequence[Tensor],
    dys: Sequence[Tensor],  # [..., T, .] of each output of `run`
    rows: int,
    autocast: dict[str, Any],
    need_input: bool,
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dx and the gradients of `weights`, of a `run` that acts on each token by itself: `rows` tokens at a time, each
    tile with a graph of its own. Weights' gradients are summed in fp32 at least."""
    dx = torch.empty_like(x) if need_input else None
    sums: list[Tensor | None] = [None] * len(weights)
    for start in range(0, x.shape[-2], rows):
        tile = (..., slice(start, start + rows), slice(None))
        x_tile = x[tile].detach().requires_grad_(dx is not None)
        with torch.enable_grad(), torch.autocast(**autocast):
            ys = run(x_tile)
        wanted = [x_tile, *weights] if dx is not None else list(weights)
        given = [dy[tile].to(y.dtype) for y, dy in zip(ys, dys, strict=True)]
        grads = list(torch.autograd.grad(ys, wanted, given, allow_unused=True))
        if dx is not None:
            dx[tile] = grads.pop(0)
        sums = [_add(total, grad) for total, grad in zip(sums, grads, strict=True)]
    return dx, [None if s is None else s.to(w.dtype) for s, w in zip(sums, weights, strict=True)]


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: Any, rows: int) -> Tensor:
        tiles = (mlp(x[start : start + rows]) for start in range(0, len(x), rows))
        for i, tile in enumerate(tiles):
            if not isinstance(tile, Tensor) or tile.shape[1:] != x.shape[1:]:
                raise TypeError("tiled_mlp: an MLP that changes the shape of its input cannot be tiled")
            if i == 0:
                y = tile.new_empty(x.shape)  # under autocast not of x's dtype
            y[i * rows : i * rows + rows] = tile
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return dy, None, None


_input: Callable[..., Tensor] = _Input.apply
_output: Callable[..., Tensor] = _Output.apply


def _add(total: Tensor | None, grad: Tensor | None) -> Tensor | None:
    if grad is None:
        return total
    wide = torch.promote_types(grad.dtype, torch.float32)
    return grad.to(wide) if total is None else total.add_(grad)


def autocast_of(x: Tensor) -> dict[str, Any]:
    """The arguments of torch.autocast that a recompute runs under."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):
        return {"device_type": "cpu", "enabled": False}
    return {"device_type": kind, "enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}
