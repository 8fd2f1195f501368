"""Selective checkpoints: attention's output is packed in the forward, and the recompute takes it from there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from longgrpo.offload.record import Record

# Ops that return the attention output with its log-sum-exp: all that their backward needs besides q, k and v.
ATTENTION_OPS = frozenset({
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
})  # fmt: skip


def attention_contexts(
    pack: Callable[[Tensor], Record], report: Callable[[str], None]
) -> tuple[_SaveAttention, _ReplayAttention]:
    """The contexts of a checkpoint's forward and of its recompute, as torch's `context_fn` gives them."""
    saved: list[Any] = []
    return _SaveAttention(pack, report, saved), _ReplayAttention(saved)


class _SaveAttention(TorchDispatchMode):
    """Runs the forward and packs what attention ops return."""

    def __init__(self, pack: Callable[[Tensor], Record], report: Callable[[str], None], saved: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.pack, self.report, self.saved = pack, report, saved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _is_attention(func, args, kwargs or {}):
            self.saved.append(tree_map_only(Tensor, self.pack, out))
        return out

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if not self.saved and error[0] is None:
            self.report(
                "selective mode found no attention op to skip in a checkpointed function: attention is recomputed. "
                "It needs a fused kernel without dropout, such as attn_implementation='sdpa'"
            )


class _ReplayAttention(TorchDispatchMode):
    """Runs the recompute; attention ops return what the forward packed, in the same order."""

    def __init__(self, saved: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.saved = saved

    def __enter__(self) -> Any:
        self.next = iter(self.saved)
        return super().__enter__()  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_attention(func, args, kwargs or {}):
            return tree_map_only(Record, lambda record: record.unpack(), next(self.next))
        return func(*args, **(kwargs or {}))


def _is_attention(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Dropout draws random numbers: to skip it would shift every later draw of the recompute."""
    schema = func._schema
    if schema.name not in ATTENTION_OPS:
        return False
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    return not given.get("dropout_p", 0.0)
