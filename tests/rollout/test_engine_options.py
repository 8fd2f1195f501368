"""The key-value cache given back or in fp8, packed weights, and prompts shared within a rollout."""

import pytest
import torch

from longgrpo.config.model import LoraConfig
from longgrpo.rollout import vllm_cache
from testing.agreement import assert_agrees, sampled_logprobs, trainer_logprobs
from testing.engines import PROMPTS, RANDOM, change, running, sample, write_model

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    write_model("llama", directory)
    return directory


def test_the_cache_is_given_back_between_rollouts(directory):
    with running(directory, release_kv_cache=True) as (engine, model):
        held = engine._kv_bytes
        assert sum(held) == pytest.approx(0.05 * 2**30, rel=0.01)
        first = sample(engine)
        for _ in range(2):
            assert vllm_cache.kv_cache_bytes(engine.llm) == [0] * len(held)
            weights = {name: p.clone() for name, p in model.named_parameters()}
            assert sample(engine) == first
            assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
        assert_agrees(model, PROMPTS, first)
    with running(directory) as (engine, _):
        assert sample(engine) == first
        assert vllm_cache.kv_cache_bytes(engine.llm) == held


@pytest.mark.skipif(
    not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()),
    reason="vLLM keeps a cache in fp8 on processors with AVX-512 or AMX",
)
def test_the_gap_of_an_fp8_cache_is_seen(directory):
    with running(directory, kv_cache_dtype="fp8") as (engine, model):
        completions = sample(engine)
        gap = (trainer_logprobs(model, PROMPTS, completions) - sampled_logprobs(completions)).abs().mean()
        assert 1e-4 < gap < 0.3
        context = engine.llm.llm_engine.vllm_config.compilation_config.static_forward_context
        scales = [(layer._k_scale_float, layer._v_scale_float) for layer in context.values()]
        assert all(scale not in (0.0, 1.0) for pair in scales for scale in pair)
        vllm_cache.calibrate_kv_cache(engine.llm, engine._some_tokens())  # as another process would, on a resume
        again = [(layer._k_scale_float, layer._v_scale_float) for layer in context.values()]
        assert again == [pytest.approx(pair, rel=0.2) for pair in scales]  # now of keys out of an fp8 cache
        assert not any("do_kv_cache_update" in vars(layer.impl) for layer in context.values())


def test_an_fp8_cache_that_the_processor_cannot_keep(directory, monkeypatch):
    for feature in ("_is_avx512_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, feature, lambda: False)
    with (
        pytest.raises(ValueError, match=r"rollout.kv_cache_dtype = fp8: .*AVX-512"),
        running(directory, kv_cache_dtype="fp8"),
    ):
        pass


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_in_half_precision(directory, dtype):
    with running(directory, dtype=dtype) as (engine, model):
        completions = sample(engine)
        gap = (trainer_logprobs(model, PROMPTS, completions) - sampled_logprobs(completions)).abs().mean()
        assert 0 < gap < 0.2


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4, mode="merge"), LoraConfig(rank=8, alpha=8, mode="views")])
def test_packed_weights_follow_every_update(directory, lora):
    with running(directory, lora, repack_weights=True) as (engine, model):
        for _ in range(2):
            change(model)
            engine.weights_changed()
            assert_agrees(model, PROMPTS, sample(engine))


def test_completions_of_one_prompt_share_its_cache(directory, monkeypatch):
    """In one call: 3 of a prompt's 4 completions find its whole blocks of 32 tokens computed."""
    with running(directory) as (engine, _):
        step, seen = engine.llm.llm_engine.step, {}

        def recorded():
            outputs = step()
            seen.update({output.request_id: output.num_cached_tokens for output in outputs if output.finished})
            return outputs

        monkeypatch.setattr(engine.llm.llm_engine, "step", recorded)
        prompts = [[7 + i] * 100 for i in range(3) for _ in range(4)]
        engine.generate(prompts, RANDOM, range(12))
        assert [seen[request] for request in sorted(seen, key=int)] == [0, 96, 96, 96] * 3
