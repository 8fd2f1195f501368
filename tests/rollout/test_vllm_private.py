"""A canary for each private name of vLLM that longgrpo.rollout.vllm_private touches: in a version that moved one, the
name stands in the failure. Those of vllm_shared and vllm_cache: test_vllm_shared.py."""

import inspect
import os
import subprocess
import sys

import pytest
import torch

from longgrpo.config.model import LoraConfig
from longgrpo.rollout import vllm_private
from testing.engines import running, write_model

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    write_model("llama", directory)
    with running(directory, LoraConfig(rank=8, alpha=8, mode="copy")) as (engine, _):
        yield engine.llm


@pytest.fixture(scope="module")
def runner(llm):
    return llm.llm_engine.model_executor.driver_worker.model_runner


@pytest.fixture(scope="module")
def workers(runner):
    return runner.lora_manager


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_dispatch_cpu_unquantized_gemm():
    """live_linears stands in for it, and repack calls it: it sets layer.cpu_linear, called with (x, weight, bias)."""
    from vllm.model_executor.layers import utils

    assert parameters(utils.dispatch_cpu_unquantized_gemm) == ["layer", "remove_weight"]
    assert parameters(utils.cpu_unquantized_gemm) == ["layer", "x", "weight", "bias"]
    layer = torch.nn.Linear(64, 32, bias=False).requires_grad_(False)
    utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer.cpu_linear(x, layer.weight, None), x @ layer.weight.T)
    assert layer.weight.numel() == 64 * 32


def test_every_linear_of_the_engine_runs_on_its_live_weight(llm):
    linears = [m for m in vllm_private.engine_module(llm).modules() if "cpu_linear" in vars(m)]
    assert len(linears) == 2 * 4 + 2  # qkv, o, gate_up, down of two layers; the embedding and the head
    assert {module.cpu_linear for module in linears} == {vllm_private.plain_linear}


def test_the_operators_are_each_of_the_engines_parts_once_a_layer(llm):
    names = list(vllm_private.operators(vllm_private.engine_module(llm)))
    layer = [
        "input_layernorm", "self_attn.qkv_proj", "self_attn.rotary_emb", "self_attn.attn", "self_attn.o_proj",
        "post_attention_layernorm", "mlp.gate_up_proj", "mlp.act_fn", "mlp.down_proj",
    ]  # fmt: skip
    layers = [f"model.layers.{i}.{part}" for i in range(2) for part in layer]
    assert sorted(names) == sorted(["model.embed_tokens", *layers, "model.norm"])


LINEARS = """
import torch
from longgrpo.rollout import vllm_private
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((5, 64), (48, 64), (48,)))
    expected = torch.addmm(bias.double(), x.double(), weight.double().T)
    found, epsilon = vllm_private.plain_linear(x, weight, bias).double(), torch.finfo(dtype).eps
    terms = x.abs().double() @ weight.abs().double().T + bias.abs().double()
    # 65 roundings of a partial sum in float32; below it the result is rounded to the type
    bound = 65 / 2 * epsilon * terms if dtype == torch.float32 else epsilon * (64 + expected.abs())
    assert ((found - expected).abs() <= bound).all(), dtype
"""


@pytest.mark.parametrize("isa", ["AVX2", "DEFAULT"])
def test_linears_on_a_processor_that_lacks_a_type(isa):
    """oneDNN computes bfloat16 and float16 on some processors alone."""
    subprocess.run([sys.executable, "-c", LINEARS], env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa}, check=True)


def test_scheduler_and_its_queue(llm):
    """settle steps until both are empty, which release_kv_cache_memory() wants on a GPU."""
    core = llm.llm_engine.engine_core.engine_core
    request = {"prompt_token_ids": [5] * 40}
    llm.generate([request], use_tqdm=False)
    assert core.scheduler.has_requests()  # the outputs are out, and it has not looked yet
    vllm_private.settle(llm)
    assert not core.scheduler.has_requests()
    assert not core.batch_queue


def test_model_runner(runner):
    assert runner.get_model() is runner.model


def test_sampler(runner):
    """accurate_logprobs stands in for sample and reads the logits that it returns."""
    sampler = runner.sampler
    assert parameters(type(sampler).sample) == ["self", "logits", "sampling_metadata", "logprobs_mode_override"]
    assert sampler.topk_topp_sampler.logprobs_mode == "processed_logits"


def test_packed_modules_mapping(llm):
    module = vllm_private.engine_module(llm)
    assert module.packed_modules_mapping["qkv_proj"] == ["q_proj", "k_proj", "v_proj"]
    assert module.get_submodule("model.layers.0.self_attn.qkv_proj").output_sizes == [128, 64, 64]


def test_ranks():
    assert vllm_private.lora_ranks() == (1, 8, 16, 32, 64, 128, 256, 320, 512)


def test_lora_manager(workers):
    manager = workers._adapter_manager
    assert manager.list_adapters().keys() == {1}
    assert manager.lora_index_to_id == [1]
    assert manager.get_adapter(1).loras == {}
    layer = manager.modules["model.layers.0.mlp.gate_up_proj"]
    assert [a.shape for a in layer.lora_a_stacked] == [(1, 1, 8, 128)] * 2
    assert [b.shape for b in layer.lora_b_stacked] == [(1, 1, 192, 8)] * 2
    assert not any("embed" in name or "lm_head" in name for name in manager.modules)


def test_punica_wrapper(workers):
    """_add_one_adapter stands in for its add_lora_linear."""
    (wrapper,) = workers._adapter_manager.punica_wrapper_mapping.values()
    names = ["self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer", "kwargs"]
    assert parameters(type(wrapper).add_lora_linear) == names
    assert isinstance(wrapper.no_lora, bool)
    x, a, b = torch.randn(5, 16), torch.randn(1, 1, 4, 16), [torch.randn(1, 1, n, 4) for n in (8, 3)]
    expected, got = torch.zeros(5, 11), torch.zeros(5, 11)
    wrapper.no_lora = False
    vllm_private._add_one_adapter(wrapper, got, x, (a, a), b, 1.0, (8, 3))
    for i in range(2):
        expected[:, (0, 8)[i] : (8, 11)[i]] = x @ a[0, 0].T @ b[i][0, 0].T
    torch.testing.assert_close(got, expected)
    wrapper.no_lora = True
    vllm_private._add_one_adapter(wrapper, got, x, (a, a), b, 1.0, (8, 3))
    torch.testing.assert_close(got, expected)


def test_kv_caches(runner):
    assert len(runner.kv_caches) == 2
    assert all(isinstance(cache, torch.Tensor) for cache in runner.kv_caches)


def test_shutdown(llm):
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    assert callable(cleanup_dist_env_and_memory)
    assert callable(llm.llm_engine.engine_core.shutdown)
    assert vllm_private.is_cpu() == current_platform.is_cpu()


def test_what_gives_the_cache_back_on_a_gpu(llm):
    """Read, not run: vLLM's public calls for it."""
    assert "level" in parameters(llm.sleep)
    assert parameters(llm.release_kv_cache_memory) == []
    assert parameters(llm.wake_up) == ["tags"]


def test_step_and_enqueue(llm):
    assert "lora_request" in parameters(llm.enqueue)
    assert callable(llm.llm_engine.step)
    assert callable(llm.llm_engine.has_unfinished_requests)
