"""The operators that the trainer shares with its engine, so that both give a token the same bits (rollout.bitwise).

Linears, LoRA, the gated activation and attention have a fixed order of sums: on the CPU they are longgrpo's own
(longgrpo._ops.fixed), on a GPU vLLM's batch-invariant ones (longgrpo.rollout.vllm_invariant). Norms and the rotation of
queries and keys are transformers' formulas, whose sums are a row's own; the angles are a table, because torch's cosine
depends on where in a tensor a number stands. The residual is added, and rounded, before a norm reads it, as
transformers has it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from longgrpo._ops import fixed
from longgrpo.model.head import base_model
from longgrpo.model.lean_lora import use_lean_lora
from longgrpo.model.packed_attention import ATTENTION, attend_packed

_KINDS: dict[str, fixed.Activation] = {
    "SiLUActivation": "silu", "SiLU": "silu", "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh",
}  # fmt: skip


class Operators(Protocol):
    """Operators with a fixed order of sums, of one device: longgrpo._ops.fixed says what each computes."""

    def linear_rows(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor: ...

    def gated(self, gate: Tensor, up: Tensor, activation: fixed.Activation) -> Tensor: ...

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, query_start: Tensor, length: Tensor, *, scale: float,
        pages: Tensor | None = None, window: int = 0,
    ) -> Tensor: ...  # fmt: skip


class SharedOperators:
    """The shared operators of a transformers model [decoder layers with self_attn and mlp], by the modules' names.

    Raises NotImplementedError, which names it, for a part of the model that cannot be shared.
    """

    def __init__(self, model: Any, max_length: int, operators: Operators = fixed) -> None:
        """max_length: positions of the angles' table."""
        self.base = base_model(model)
        self.operators = operators
        # Whether every bit is known to be equal. On a GPU the head is not shared, and nothing has been measured.
        self.exact = operators is fixed
        if self.exact:
            check_dtype(self.base.dtype)
        self.mlps = {n: m for n, m in self.base.named_modules() if n.rpartition(".")[2] == "mlp"}
        self.activations = {name: _activation(name, mlp) for name, mlp in self.mlps.items()}
        self.attentions: dict[str, Any] = {
            name: module for name, module in self.base.named_modules() if name.rpartition(".")[2] == "self_attn"
        }
        if not self.attentions or len(self.attentions) != len(self.mlps):
            raise NotImplementedError(
                f"rollout.bitwise: {type(self.base).__name__} has layers that are not self_attn and mlp"
            )
        self.rotary: Any = next((m for n, m in self.base.named_modules() if n.endswith("rotary_emb")), None)
        if self.rotary is None:
            raise NotImplementedError(f"rollout.bitwise: {type(self.base).__name__} has no rotary embedding")
        # The kinds of layers that the rotary embedding tells apart.
        kinds: list[str | None] = list(getattr(self.rotary, "layer_types", None) or [None])
        for kind in kinds:
            rope = self.rotary.rope_type[kind] if kind else self.rotary.rope_type
            if rope in ("dynamic", "longrope"):
                raise NotImplementedError(f"rollout.bitwise: rope_type = {rope}, whose angles depend on the length")
        on_meta = self.base.device.type == "meta"  # an outline, that is asked only what it refuses
        self.angles = {} if on_meta else {kind: self._table(kind, max_length) for kind in kinds}

    # ---- rotation

    def layer_type(self, attention: str) -> str | None:
        kind = getattr(self.attentions[attention], "layer_type", None)
        return kind if kind in self.angles else None

    def _table(self, kind: str | None, max_length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [max_length, D] in the model's dtype."""
        like = torch.empty(0, dtype=self.base.dtype, device=self.base.device)
        options = {"layer_type": kind} if kind else {}
        positions = torch.arange(max_length, device=self.base.device)[None]
        cos, sin = type(self.rotary).forward(self.rotary, like, positions, **options)
        return cos[0], sin[0]

    def rotate(self, attention: str, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys [N, heads, D] at `positions` [N], rotated."""
        cos, sin = (table[positions] for table in self.angles[self.layer_type(attention)])
        apply = sys.modules[type(self.attentions[attention]).__module__].apply_rotary_pos_emb
        rotated: tuple[Tensor, Tensor] = apply(query, key, cos, sin, unsqueeze_dim=1)
        return rotated

    # ---- the trainer's side

    def use_in(self, model: Any) -> None:
        """Makes `model`, PEFT or not, run them, in place. Its base is the model that they are of."""
        if model is not self.base:
            use_lean_lora(model, add=functools.partial(_add_lora, self.operators))
        head = self.base.get_output_embeddings()
        for name, module in self.base.named_modules():
            if type(module) is nn.Linear and module is not head and "lora_" not in name:
                module.forward = functools.partial(_linear, self.operators, module)  # type: ignore[method-assign]
        for name, mlp in self.mlps.items():
            mlp.forward = functools.partial(_mlp, self.operators, mlp, self.activations[name])
        for attention in self.attentions.values():
            setattr(attention, ATTENTION, functools.partial(packed_attention, self.operators))
        self.rotary.forward = self._rotary

    def _rotary(self, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        cos, sin = self.angles[layer_type if layer_type in self.angles else None]
        return cos[position_ids], sin[position_ids]


def check_dtype(dtype: torch.dtype) -> None:
    """Raises NotImplementedError for a dtype that the operators do not have here."""
    if dtype == torch.float16:
        raise NotImplementedError("rollout.bitwise: model.dtype = float16; take bfloat16 or float32")
    if dtype == torch.bfloat16 and not fixed.has_bf16():
        raise NotImplementedError(
            "rollout.bitwise: model.dtype = bfloat16 needs a processor with AVX512-BF16; take float32"
        )


def _activation(name: str, mlp: Any) -> fixed.Activation:
    act = getattr(mlp, "act_fn", None) or getattr(mlp, "activation_fn", None)
    gated = hasattr(mlp, "down_proj") and (hasattr(mlp, "gate_up_proj") or hasattr(mlp, "gate_proj"))
    kind = _KINDS.get(type(act).__name__)
    if not gated or kind is None:
        raise NotImplementedError(
            f"rollout.bitwise: {name} is a {type(mlp).__name__} with {type(act).__name__}; an MLP with a gate and SiLU "
            "or GELU (tanh) is shared"
        )
    return kind


def _linear(operators: Operators, module: nn.Linear, x: Tensor) -> Tensor:
    return fixed.linear(x, module.weight, module.bias, operators.linear_rows)


def _mlp(operators: Operators, mlp: Any, activation: fixed.Activation, x: Tensor) -> Tensor:
    if hasattr(mlp, "gate_proj"):
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    else:
        gate, up = mlp.gate_up_proj(x).chunk(2, dim=-1)
    y: Tensor = mlp.down_proj(operators.gated(gate, up, activation))
    return y


@torch.no_grad()
def add_lora_(operators: Operators, y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y [N, out] += B (A x), in place: x [N, in], A [r, in], B [out, r]; y may be columns of a wider tensor. Returns
    A x."""
    down = operators.linear_rows(x, a)
    y.add_(operators.linear_rows(down, b))
    return down


def _add_lora(operators: Operators, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """add_in_place in the shared order."""
    scaled = b if scale == 1 else b * scale  # as LoraSlots.publish has it
    return add_lora_(operators, y, x, a.to(x.dtype), scaled.to(x.dtype))


def packed_attention(
    operators: Operators,
    query: Tensor,  # [1, heads, N, D]
    key: Tensor,  # [1, kv_heads, N, D]
    value: Tensor,
    cu_seqlens: Tensor,
    lengths: Sequence[int],
    own_lengths: Sequence[int],
    shared_rows: Tensor | None,
    own_rows: Tensor | None,
    scale: float | None,
) -> Tensor:
    """[1, N, heads, D]; see PackedBatch. Forward in the fixed order, backward through torch's attention."""
    out: Tensor = _PackedAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, cu_seqlens, lengths, own_lengths, shared_rows, own_rows, scale, operators
    )
    return out


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, lengths: Sequence[int],
        own_lengths: Sequence[int], shared_rows: Tensor | None, own_rows: Tensor | None, scale: float | None,
        operators: Operators,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(query, key, value)
        ctx.batch = cu_seqlens, lengths, shared_rows, own_rows, scale
        if shared_rows is not None:
            key, value = key.index_select(2, shared_rows), value.index_select(2, shared_rows)
        rows = [x[0].transpose(0, 1) for x in (query, key, value)]  # [N, heads, D]
        starts = torch.tensor([0, *own_lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        length = torch.tensor(lengths, dtype=torch.int32)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return operators.attention(*_alike(*rows), starts, length, scale=scale)[None]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = attend_packed(*inputs, *ctx.batch)
        return (*torch.autograd.grad(out, inputs, dy), *[None] * 7)


def _alike(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With keys and values in the same strides."""
    if key.stride() == value.stride():
        return query, key, value
    return query, key.contiguous(), value.contiguous()
