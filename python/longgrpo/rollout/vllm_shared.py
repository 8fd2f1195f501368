"""vLLM runs the operators that the trainer runs (rollout.bitwise): those of SharedOperators take the place of its own,
module by module, in the engine that is given and in no other. On a GPU its attention and its head stay its own."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from longgrpo._ops import fixed
from longgrpo._ops.library import ops
from longgrpo.model.head import head_of
from longgrpo.model.shared_operators import Operators, SharedOperators, add_lora_
from longgrpo.rollout import vllm_invariant, vllm_private

if TYPE_CHECKING:
    from vllm import LLM

PAGE = 32  # tokens of a block of the cache, as VllmEngine has it on the CPU
GREEDY = 1e-5  # vLLM samples greedily below this temperature
NOT_SHARED = ("alibi_slopes", "logits_soft_cap", "sinks", "kv_sharing_target_layer_name")  # of an attention: None or 0


def share_operators(llm: LLM, shared: SharedOperators) -> None:
    """Raises NotImplementedError, which names it, for a part of the engine's model that is not shared."""
    module = vllm_private.engine_module(llm)
    own = dict(shared.base.named_modules())
    operators: dict[str, Any] = dict(vllm_private.operators(module))
    cpu = vllm_private.is_cpu()
    for name, operator in operators.items():
        kind, (owner, _, leaf) = type(operator).__name__, name.rpartition(".")
        if kind.endswith("RMSNorm"):
            operator._forward_method = functools.partial(_norm, own[name])
        elif leaf == "rotary_emb":  # vLLM's is shared by all engines of a process
            setattr(module.get_submodule(owner), leaf, Rotation(shared, owner))
        elif kind == "Attention":
            _check_attention(name, operator.impl)
            (_share_attention if cpu else _check_invariant)(name, operator.impl)
        elif kind.endswith("AndMul") and owner in shared.activations:
            operator._forward_method = functools.partial(_gate, shared.operators, shared.activations[owner])
        elif not ("Linear" in kind or kind.endswith("Embedding")):
            raise NotImplementedError(f"rollout.bitwise: the engine's {name} is a {kind}, which is not shared")
    if cpu:
        _share_linears(module)
        _share_head(llm, shared.base)
    else:
        _share_parts(module)


def _share_linears(module: Any) -> None:
    for layer in module.modules():
        if vars(layer).get("cpu_linear") is vllm_private.plain_linear:
            layer.cpu_linear = fixed.linear_rows


def _share_parts(module: Any) -> None:
    """A GPU's linears: the size of a fused one may choose another order than those of the trainer's."""
    for name, layer in module.named_modules():
        parts = module.packed_modules_mapping.get(name.removesuffix(".base_layer").rpartition(".")[2], ())
        if len(parts) > 1 and "quant_method" in vars(layer):  # a layer with LoRA has its base's
            layer.quant_method = vllm_invariant.Parts(layer.quant_method, layer.output_sizes)


def _norm(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Any:
    if residual is None:
        return norm(x)
    total = x + residual
    return norm(total), total


def _gate(operators: Operators, activation: fixed.Activation, x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return operators.gated(gate, up, activation)


class Rotation(nn.Module):
    """The rotary embedding of one layer, as vLLM calls it."""

    def __init__(self, shared: SharedOperators, attention: str) -> None:
        super().__init__()
        self.rotate = functools.partial(shared.rotate, attention)
        self.head_size = shared.attentions[attention].head_dim

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        heads = (x.view(len(x), -1, self.head_size) for x in (query, key))
        query, key = self.rotate(positions, *heads)
        return query.flatten(1), key.flatten(1)


def _check_attention(name: str, impl: Any) -> None:
    for what in NOT_SHARED:
        value = getattr(impl, what)
        if isinstance(value, Tensor) or value:
            raise NotImplementedError(f"rollout.bitwise: the engine's {name} has {what}, which is not shared")


def _check_invariant(name: str, impl: Any) -> None:
    """The trainer calls the kernel of vLLM's FLASH_ATTN."""
    kind = type(impl).__name__
    if kind != "FlashAttentionImpl" or not impl.batch_invariant_enabled:
        raise NotImplementedError(
            f"rollout.bitwise: the engine's {name} is a {kind}; the trainer shares vLLM's FLASH_ATTN in its "
            "batch-invariant mode"
        )


def _share_attention(name: str, impl: Any) -> None:
    impl.do_kv_cache_update = _write_cache
    impl.forward = functools.partial(_attend, impl.scale, max(impl.sliding_window, 0))


def _pages(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [pages, 32, key_heads, D] of a cache [pages, key_heads, 32, 2 D], head after head."""
    pages, heads, page, width = kv_cache.shape
    assert page == PAGE
    halves = kv_cache.view(pages, heads, 2, page, width // 2).transpose(1, 3)  # [pages, 32, 2, key_heads, D]
    return halves[:, :, 0], halves[:, :, 1]


def _write_cache(layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    pages, rows = slots // PAGE, slots % PAGE
    for cache, new in zip(_pages(kv_cache), (key, value), strict=True):
        cache[pages, rows] = new[: len(slots)]


def _attend(
    scale: float,
    window: int,
    layer: Any,
    query: Tensor,  # [T, heads, D]
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    metadata: Any,
    output: Tensor,
    **unused: Any,
) -> Tensor:
    if metadata is None:  # a warm-up
        return output
    count = metadata.num_actual_tokens
    output[:count] = fixed.attention(
        query[:count],
        *_pages(kv_cache),
        metadata.query_start_loc,
        metadata.seq_lens,
        scale=scale,
        pages=metadata.block_table,
        window=window,
    )
    return output


def add_slice(operators: Operators, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """A slice of vLLM's add_lora_linear in the trainer's order. The scale is in B already."""
    add_lora_(operators, y, x, a, b)


def _share_head(llm: LLM, model: Any) -> None:
    """Logits and the sampled tokens' logprobs are those of the trainer's head."""
    options = head_of(model).options
    bias = options["bias"]
    logits: list[Tensor] = []  # [rows, V] of the tokens that are sampled next, before the head's transform

    def head(x: Tensor, weight: Tensor, added: Tensor | None) -> Tensor:
        found = vllm_private.wide_logits(x, weight, None)
        logits[:] = [found[:, : model.config.get_text_config().vocab_size].clone()]
        return found if added is None else found.add_(added.float())

    layers: list[Any] = list(vllm_private.engine_module(llm).modules())
    for layer in layers:
        if vllm_private.is_head(layer) and "cpu_linear" in vars(layer):
            layer.cpu_linear = head

    def logprobs(processed: Tensor, tokens: Tensor, metadata: Any) -> Tensor:
        """Of only the sampled tokens: no others are asked for."""
        given, chosen = metadata.temperature, tokens.long()
        temperature = torch.ones(len(chosen)) if given is None else given.where(given >= GREEDY, 1.0).float()
        logp = ops.logits_logprob(
            logits[0], chosen, None if bias is None else bias.float(), temperature, options["softcap"] or 0.0,
            options["logit_scale"],
        )  # fmt: skip
        return processed.scatter_(1, chosen[:, None], logp[:, None])

    vllm_private.accurate_logprobs(llm, logprobs)
