"""Checkpoints whose inputs are offloaded, and their selective form, which offloads the output of attention as well."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from longgrpo.offload.record import Record

if TYPE_CHECKING:
    from longgrpo.offload.engine import OffloadEngine

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


def checkpoint(
    engine: OffloadEngine, fn: Callable[..., Any], *args: Any, selective: bool = False, **kwargs: Any
) -> Any:
    if kwargs.setdefault("use_reentrant", False):
        raise ValueError("offload works with non-reentrant checkpoints: pass use_reentrant=False, or nothing")
    if engine.is_disabled or not torch.is_grad_enabled():  # in another checkpoint, its recompute brings the input back
        return torch_checkpoint(fn, *args, **kwargs)
    group = engine.next_group()
    _report_keywords(engine, fn, kwargs)
    if selective:
        if "context_fn" in kwargs:
            raise ValueError("selective=True brings its own context_fn: pass one or the other")
        kwargs["context_fn"] = functools.partial(_attention_contexts, engine, group)

    def inner(*args: Any, **kwargs: Any) -> Any:
        with engine.disabled():
            return fn(*args, **kwargs)

    # These hooks see the checkpoint save its inputs; inside it, its own hooks are the innermost.
    with engine.saving(lambda: group):
        return torch_checkpoint(inner, *args, **kwargs)


def install(engine: OffloadEngine, model: Any, *, selective: bool = False) -> Any:
    if not hasattr(model, "gradient_checkpointing_enable"):
        raise TypeError(
            f"{type(model).__name__} is not a transformers model: call its layers as engine.checkpoint(layer, hidden)"
        )
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = functools.partial(engine.checkpoint, selective=selective)
    return model


def _report_keywords(engine: OffloadEngine, fn: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    given = {**fn.keywords, **kwargs} if isinstance(fn, functools.partial) else kwargs
    for name, value in given.items():
        if isinstance(value, Tensor) and value.requires_grad and not value.is_leaf:
            engine.report_invisible(name, value)


class _SaveAttention(TorchDispatchMode):
    """Runs the forward and packs what attention ops return."""

    def __init__(self, engine: OffloadEngine, group: int, saved: list[Any]) -> None:
        super().__init__()
        self.engine, self.group, self.saved = engine, group, saved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _is_attention(func, args, kwargs or {}):
            self.saved.append(tree_map_only(Tensor, lambda tensor: self.engine.pack(tensor, self.group), out))
        return out

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if not self.saved and error[0] is None:
            self.engine.report(
                "selective mode found no attention op to skip in a checkpointed function: attention is recomputed. "
                "It needs a fused kernel without dropout, such as attn_implementation='sdpa'"
            )


class _ReplayAttention(TorchDispatchMode):
    """Runs the recompute; attention ops return what the forward packed, in the same order."""

    def __init__(self, saved: list[Any]) -> None:
        super().__init__()
        self.saved = saved

    def __enter__(self) -> Any:
        self.next = iter(self.saved)
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_attention(func, args, kwargs or {}):
            return tree_map_only(Record, lambda record: record.unpack(), next(self.next))
        return func(*args, **(kwargs or {}))


def _attention_contexts(engine: OffloadEngine, group: int) -> tuple[_SaveAttention, _ReplayAttention]:
    saved: list[Any] = []
    return _SaveAttention(engine, group, saved), _ReplayAttention(saved)


def _is_attention(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Dropout draws random numbers: to skip it would shift every later draw of the recompute."""
    schema = func._schema
    if schema.name not in ATTENTION_OPS:
        return False
    given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    return not given.get("dropout_p", 0.0)
