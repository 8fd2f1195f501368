"""Attention by groups of key-value heads: all between its projections a few heads at a time, with exact gradients.

    forward    q, k, v = projections of x;  out[g] = core(q[g], k[g], v[g])                    without a graph
    backward   q, k, v again;  dq[g], dk[g], dv[g] = gradients of core(q[g], k[g], v[g]), dout[g], in place of q, k, v;
               dx, dW = gradients of the projections, a tile of rows at a time

for each group g of key-value heads and the query heads that read them. The core is the layer's own forward, with its
norms and its rotation, between projections that are given: head by head it is what the whole computes. x is all that is
kept; the rotated q, k and v, and the workspace of the attention's backward, are those of one group. The price is one
more run of the projections and of attention's forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from longgrpo.model.head import base_model
from longgrpo.model.tiled_mlp import autocast_of, tiled_gradients

Model = TypeVar("Model", bound=nn.Module)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma")
"""Those whose attention has nothing that mixes heads between the projections of q, k and v and o_proj."""
FUSED, APART = ("qkv_proj",), ("q_proj", "k_proj", "v_proj")


def check_family(kind: str) -> None:
    """Raises ValueError for a `model_type` whose attention cannot be had by groups of heads."""
    if kind not in FAMILIES:
        raise ValueError(
            f"memory.attention_heads: the attention of the architecture {kind!r} is not known to come apart by heads; "
            f"leave it out, or take a model of {', '.join(FAMILIES)}"
        )


def group_attention(model: Model, kv_heads: int, rows: int | None = None) -> Model:
    """Switches the attention of a transformers model (or its PEFT wrapper) to `kv_heads` key-value heads at a time, in
    place. After LoRA, use_packed_attention and tile_norms, whose forwards it takes as they are.

    Args:
        kv_heads: of a group; the last group may have fewer.
        rows: tokens of a tile in the backward of the projections; None takes the hidden size.

    Raises:
        ValueError: kv_heads < 1, or a family whose heads do not come apart.
    """
    if kv_heads < 1:
        raise ValueError(f"kv_heads must be >= 1, not {kv_heads}")
    check_family(base_model(model).config.model_type)  # type: ignore[arg-type]
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "self_attn":
            module.__dict__.pop("forward", None)
            module.forward = _Grouped(module, kv_heads, rows)
    return model


class _Given(nn.Module):
    """In the place of a projection: what it would have returned."""

    value: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.value


class _Grouped:
    """The forward of an attention layer."""

    def __init__(self, module: Any, kv_heads: int, rows: int | None) -> None:
        self.module, self.kv_heads, self.rows = module, kv_heads, rows
        self.names = FUSED if hasattr(module, FUSED[0]) else APART
        config, head_dim = module.config, module.head_dim
        self.widths = [head_dim * config.num_attention_heads, *[head_dim * config.num_key_value_heads] * 2]  # q, k, v
        self.core = copy.copy(module)  # the same norms and config, other projections
        given = {name: _Given() for name in self.names}
        self.core._modules = {**module._modules, **given, "o_proj": nn.Identity()}

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if len(args) > 2 or kwargs.get("past_key_values") is not None:
            raise NotImplementedError("memory.attention_heads: attention with a cache of keys and values")

        def run(x: Tensor) -> Tensor:
            out: Tensor = self.core.forward(x, *args, **kwargs)[0]
            return out

        call = _Call(self, run)
        carrier = _input(hidden_states, call, *call.weights)  # [1, N, heads D] without storage of its own
        return self.module.o_proj(_output(carrier, hidden_states.detach(), call)), None

    def project(self, x: Tensor) -> list[Tensor]:
        """q, k and v [1, N, heads D], before their norms and rotation."""
        out = [getattr(self.module, name)(x) for name in self.names]
        return list(out[0].split(self.widths, -1)) if self.names == FUSED else out

    def give(self, qkv: list[Tensor]) -> None:
        """The core's projections return these heads."""
        if self.names == FUSED:  # the core cuts them apart by the numbers of heads
            query, key = (part.shape[-1] // self.module.head_dim for part in qkv[:2])
            self.core.config, self.core.num_key_value_heads = copy.copy(self.module.config), key
            self.core.config.num_attention_heads = query
            qkv = [torch.cat(qkv, -1)]
        for name, value in zip(self.names, qkv, strict=True):
            getattr(self.core, name).value = value

    def groups(self) -> Iterator[list[slice]]:
        """Columns of q, k and v."""
        ratio = self.widths[0] // self.widths[1]
        step = self.kv_heads * self.module.head_dim
        for start in range(0, self.widths[1], step):
            end = min(start + step, self.widths[1])
            yield [slice(ratio * start, ratio * end), slice(start, end), slice(start, end)]


class _Call:
    """One call of a layer: its positions and sequences are those of a batch."""

    def __init__(self, layer: _Grouped, run: Callable[[Tensor], Tensor]) -> None:
        self.layer, self.run = layer, run
        projections = [getattr(layer.module, name) for name in layer.names]
        self.projections = [p for module in projections for p in module.parameters() if p.requires_grad]
        self.inside = [p for p in layer.core.parameters() if p.requires_grad]  # of the norms
        self.weights = [*self.projections, *self.inside]

    def core(self, x: Tensor, qkv: list[Tensor]) -> Tensor:
        """[1, N, Q] of the heads in `qkv`; of x only the shape is read."""
        self.layer.give(qkv)
        try:
            return self.run(x)
        finally:
            for name in self.layer.names:
                del getattr(self.layer.core, name).value


class _Input(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, *weights: Tensor) -> Tensor:
        ctx.call, ctx.autocast = call, autocast_of(x)
        ctx.save_for_backward(x)
        return x.new_zeros(()).expand(*x.shape[:-1], call.layer.widths[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        call: _Call = ctx.call
        layer = call.layer
        with torch.autocast(**ctx.autocast):
            qkv = layer.project(x)
        inside: list[Tensor | None] = [None] * len(call.inside)
        for columns in layer.groups():
            parts = [part[..., c].detach().requires_grad_() for part, c in zip(qkv, columns, strict=True)]
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                out = call.core(x, parts)
            dy = dout[..., columns[0]].to(out.dtype)
            grads = list(torch.autograd.grad(out, [*parts, *call.inside], dy))
            del out, dy, parts
            for part, c in zip(qkv, columns, strict=True):
                part[..., c] = grads.pop(0)  # nobody reads these heads' q, k and v again
            inside = [g if total is None else total + g for total, g in zip(inside, grads, strict=True)]
        dx, totals = tiled_gradients(
            layer.project, x, call.projections, qkv, layer.rows or x.shape[-1], ctx.autocast, ctx.needs_input_grad[0]
        )
        return dx, None, *totals, *inside


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, x: Tensor, call: _Call) -> Tensor:
        qkv = call.layer.project(x)
        out = qkv[0].new_empty(carrier.shape)
        for columns in call.layer.groups():
            parts = [part[..., c] for part, c in zip(qkv, columns, strict=True)]
            out[..., columns[0]] = call.core(x, parts)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        return dout, None, None


_input: Callable[..., Tensor] = _Input.apply
_output: Callable[..., Tensor] = _Output.apply
