"""The engine's key-value cache: its memory given back between rollouts, its fp8 scales from what it really holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longgrpo.rollout.vllm_private import is_cpu, settle

if TYPE_CHECKING:
    from vllm import LLM


def release_kv_cache(llm: LLM) -> None:
    """Gives the memory of the key-value cache back. Nothing may be generated until restore_kv_cache."""
    settle(llm)
    if is_cpu():
        llm.reset_prefix_cache()
        for storage in _kv_storages(llm):
            storage.resize_(0)
    else:  # read in vLLM 0.32.0, not yet run
        llm.sleep(level=0)
        llm.release_kv_cache_memory()


def restore_kv_cache(llm: LLM, nbytes: Sequence[int]) -> None:
    """`nbytes`: what kv_cache_bytes said before the release."""
    if is_cpu():
        for storage, size in zip(_kv_storages(llm), nbytes, strict=True):
            storage.resize_(size)
    else:
        llm.wake_up(tags=["kv_cache"])
        llm.wake_up(tags=["scheduling"])


def kv_cache_bytes(llm: LLM) -> list[int]:
    """The bytes of each storage that holds the key-value cache; on a GPU vLLM keeps count itself."""
    return [] if not is_cpu() else [storage.nbytes() for storage in _kv_storages(llm)]


def _kv_storages(llm: LLM) -> list[torch.UntypedStorage]:
    caches = llm.llm_engine.model_executor.driver_worker.model_runner.kv_caches
    storages = [tensor.untyped_storage() for tensor in caches]
    return list({storage._cdata: storage for storage in storages}.values())


E4M3_MAX = 448.0
HEADROOM = 2.0  # keys and values may grow to this many times what they are now


def calibrate_kv_cache(llm: LLM, prompt: Sequence[int]) -> None:
    """Scales for the keys and values of each layer in an fp8 cache, from those of a prompt: vLLM's are 1, at which
    small values fall among the subnormals, with two bits or one. On a GPU the scales are tensors: read in vLLM 0.32.0,
    not yet run."""
    layers = [
        layer
        for layer in llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        if hasattr(layer, "_k_scale_float") and hasattr(layer.impl, "do_kv_cache_update")
    ]
    largest = [[0.0, 0.0] for _ in layers]

    def watched(update: Any, seen: list[float]) -> Any:
        def call(layer: Any, key: Tensor, value: Tensor, *rest: Any) -> None:
            for i, tensor in enumerate((key, value)):
                seen[i] = max(seen[i], tensor.abs().max().item())
            update(layer, key, value, *rest)

        return call

    from vllm import SamplingParams

    for layer, seen in zip(layers, largest, strict=True):
        layer.impl.do_kv_cache_update = watched(layer.impl.do_kv_cache_update, seen)
    try:
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        prompts: Any = [{"prompt_token_ids": list(prompt)}]
        llm.generate(prompts, params, use_tqdm=False)
    finally:
        for layer in layers:
            del layer.impl.do_kv_cache_update
    for layer, seen in zip(layers, largest, strict=True):
        for which, most in zip(("k", "v"), seen, strict=True):
            scale = HEADROOM * most / E4M3_MAX or 1.0
            getattr(layer, f"_{which}_scale").fill_(scale)
            setattr(layer, f"_{which}_scale_float", scale)
    llm.reset_prefix_cache()
