"""What ops hold while they run, besides what they take and return: one function for each, which the planner and the dry
run share. A counter of storages does not see it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from longgrpo._ops.library import ops
from longgrpo._ops.loss import ENTROPY_COEF


class Target(NamedTuple):
    """What the plan is for. multiprocessors: of the GPU; 0: the CPU."""

    multiprocessors: int

    @property
    def is_cuda(self) -> bool:
        return self.multiprocessors > 0


CPU = Target(0)


def head_workspace(
    target: Target,
    tokens: int,
    hidden: int,
    vocabulary: int,
    dtype: torch.dtype,
    *,
    hidden_gradient: bool,
    weight_gradient: bool,
    workspace: int,
    weight_dtype: torch.dtype | None = None,
    reference: bool = False,
    beyond_logp: bool = False,
) -> int:
    """Bytes of linear_logprob, its backward and linear_grpo_loss: the C++ of the ops says it (csrc/ops/host.cpp)."""
    held = ops.head_workspace(
        tokens, hidden, vocabulary, dtype, weight_dtype or dtype, hidden_gradient, weight_gradient, reference,
        beyond_logp, workspace, target.multiprocessors,
    )  # fmt: skip
    return int(held)


def head_gradient(target: Target, vocabulary: int, hidden: int, dtype: torch.dtype) -> int:
    """Bytes of a trained head's gradient as its op returns it: a GPU writes that of a bf16 head in bf16."""
    return (2 if target.is_cuda and dtype == torch.bfloat16 else 4) * vocabulary * hidden


def attention_workspace(target: Target, rows: int, heads: int, kv_heads: int, head_dim: int, element: int) -> int:
    """Bytes of attention's backward over `rows` tokens: FlashAttention 2 sums dQ in fp32, and writes dK and dV for
    each query head before it adds up those of a key head."""
    if not target.is_cuda:
        return 0
    accumulated = 4 * rows * heads * (_round_up(head_dim, 32) + 1)
    expanded = 2 * element * rows * heads * head_dim if heads != kv_heads else 0
    return accumulated + expanded


def ring_bytes(record: int, prefetch: int = 1) -> int:
    """Bytes of what the offload engine lends and brings back ahead, records of `record` bytes, as if they stayed."""
    return (prefetch + 1) * record


class Internal:
    """(op, args, kwargs, result) -> bytes, for the counter of the dry run and of real runs."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def __call__(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
        known = _BY_OP.get(op._schema.name)
        if known is None:
            return 0
        given = dict(zip((a.name for a in op._schema.arguments), args, strict=False)) | kwargs
        return known(self.target, given)


def _linear_logprob(target: Target, given: dict[str, Any]) -> int:
    return _head(target, given, given["direction"], False)


def _linear_logprob_backward(target: Target, given: dict[str, Any]) -> int:
    return _head(
        target, given, given["need_hidden"], given["need_weight"] or given["need_bias"],
        beyond_logp=given["entropy_grad"] is not None,
    )  # fmt: skip


def _linear_grpo_loss(target: Target, given: dict[str, Any]) -> int:
    reference = given["ref_hidden"] is not None
    return _head(
        target, given, given["need_hidden"], given["need_weight"] or given["need_bias"], reference=reference,
        beyond_logp=reference or given["constants"][ENTROPY_COEF] != 0,
    )  # fmt: skip


def _head(target: Target, given: dict[str, Any], hidden_gradient: bool, weight_gradient: bool, **options: bool) -> int:
    (tokens, hidden), vocabulary = given["hidden"].shape, given["weight"].shape[0]
    return head_workspace(
        target, tokens, hidden, vocabulary, given["hidden"].dtype, weight_dtype=given["weight"].dtype,
        hidden_gradient=hidden_gradient, weight_gradient=weight_gradient, workspace=given["workspace"], **options,
    )  # fmt: skip


def _varlen_backward(target: Target, given: dict[str, Any]) -> int:
    rows, heads, head_dim = given["query"].shape
    return attention_workspace(
        target, rows, heads, given["key"].shape[1], head_dim, given["query"].element_size()
    )  # fmt: skip


_BY_OP = {
    "longgrpo::linear_logprob": _linear_logprob,
    "longgrpo::linear_logprob_backward": _linear_logprob_backward,
    "longgrpo::linear_grpo_loss": _linear_grpo_loss,
    "torch_attn::_varlen_attn_backward": _varlen_backward,
}


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
