"""vLLM's batch-invariant operators, as trainer and engine share them on a GPU (rollout.bitwise); longgrpo._ops.fixed
has the same names on the CPU. Read in vLLM 0.32.0, not yet run on a card."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from longgrpo._ops.fixed import Activation
from longgrpo.loss.devices import on_device

PAGE = 16  # tokens of a block of the engine's cache


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, [N, M], without a gradient. Its order may depend on M: engine and trainer give it equal weights."""
    from vllm.model_executor.determinism import batch_invariant

    kernels: Any = batch_invariant
    y: Tensor = kernels.linear_batch_invariant(x, weight, bias)
    return y


def gated(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """act(gate) up, each rounded, number by number. Differentiable in both."""
    return (silu(gate) if activation == "silu" else gelu(gate, approximate="tanh")) * up


def attention(
    query: Tensor, key: Tensor, value: Tensor, query_start: Tensor, length: Tensor, *, scale: float,
    pages: Tensor | None = None, window: int = 0,
) -> Tensor:  # fmt: skip
    """fixed.attention of sequences end to end (query_start and length on the host, no pages) by the engine's kernel:
    the keys and values are laid out in pages as the engine has them, and no query's keys are split."""
    from vllm.v1.attention.backends import fa_utils

    kernels: Any = fa_utils
    assert pages is None
    table, rows = page_table(length)
    most, device = table.shape[1] * PAGE, query.device
    caches = [x.new_zeros(table.numel(), PAGE, *x.shape[1:]) for x in (key, value)]
    at = on_device(device, rows)
    for cache, x in zip(caches, (key, value), strict=True):
        cache.flatten(0, 1).index_copy_(0, at, x)
    out: Tensor = kernels.flash_attn_varlen_func(
        q=query,
        k=caches[0],
        v=caches[1],
        cu_seqlens_q=on_device(device, query_start),
        max_seqlen_q=int(query_start.diff().max()),
        seqused_k=on_device(device, length),
        max_seqlen_k=most,
        softmax_scale=scale,
        causal=True,
        window_size=[window - 1, 0] if window else [-1, -1],
        block_table=on_device(device, table),
        num_splits=1,  # as the engine has it in this mode
        fa_version=kernels.get_flash_attn_version(head_size=query.shape[-1], kv_cache_block_size=PAGE),
    )
    return out


def page_table(length: Tensor) -> tuple[Tensor, Tensor]:
    """The pages [S, P] int32 of S sequences of `length` [S], and the rows [K] of all keys in a cache of S P pages."""
    most = math.ceil(int(length.max()) / PAGE)
    table = torch.arange(len(length) * most, dtype=torch.int32).view(len(length), most)
    rows = torch.cat([sequence * most * PAGE + torch.arange(n) for sequence, n in enumerate(length.tolist())])
    return table, rows


class Parts:
    """The quant_method of an engine's linear: each part of a fused one by itself, as the trainer has them."""

    def __init__(self, whole: Any, sizes: list[int]) -> None:
        self.whole, self.sizes = whole, sizes

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, sum(sizes)]"""
        biases = [None] * len(self.sizes) if bias is None else bias.split(self.sizes)
        parts = zip(layer.weight.split(self.sizes), biases, strict=True)
        return torch.cat([linear_rows(x, weight, own) for weight, own in parts], -1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)


def check_card(dtype: str) -> None:
    """Raises NotImplementedError, which names it, for what these operators do not take."""
    if dtype != "bfloat16":
        raise NotImplementedError(f"rollout.bitwise on a GPU: model.dtype = {dtype}; its attention takes bfloat16")
    if torch.version.hip:
        raise NotImplementedError("rollout.bitwise on a GPU is for CUDA: FlashAttention's kernels on ROCm are others")
