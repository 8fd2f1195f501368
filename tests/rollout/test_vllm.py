"""vLLM on the trained model's own weights."""

import os

import psutil
import pytest
import torch

from longgrpo.config.model import LoraConfig
from longgrpo.model.load import load_model, model_on
from longgrpo.model.lora import add_lora
from longgrpo.rollout import Sampling, seed_for, vllm_private
from longgrpo.rollout.adapters import LoraMerge
from testing.agreement import assert_agrees, sampled_logprobs, trainer_logprobs

GREEDY = Sampling(temperature=0, max_tokens=8)


@pytest.fixture
def engine(vllm_engine):
    vllm_engine.attach(vllm_engine.model)
    return vllm_engine


def storages(module):
    return {p.untyped_storage().data_ptr() for p in module.parameters()}


def test_every_parameter_lies_in_the_engines_storage(engine):
    assert storages(engine.model) == storages(vllm_private.engine_module(engine.llm))
    loaded = load_model(engine.directory).state_dict()
    assert all(torch.equal(tensor, loaded.pop(name)) for name, tensor in engine.model.state_dict().items())
    assert not loaded


def test_the_trained_model_costs_no_memory(engine):
    process = psutil.Process()
    before = process.memory_info().rss
    views = vllm_private.weight_views(vllm_private.engine_module(engine.llm), engine.model.config.vocab_size)
    model = model_on(views, engine.directory)
    assert sum(p.nbytes for p in model.parameters()) > 500e6
    assert process.memory_info().rss - before < 50e6


def test_a_weight_changed_in_place_changes_the_engine_and_back(engine, prompts):
    before = engine.generate(prompts, GREEDY, [0] * 8)
    weight = engine.model.get_parameter("model.layers.3.mlp.up_proj.weight")
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(1.5)
        engine.weights_changed()
        changed = engine.generate(prompts, GREEDY, [0] * 8)
        assert_agrees(engine.model, prompts, changed)
        assert sampled_logprobs(changed)[0] != sampled_logprobs(before)[0]
    finally:
        with torch.no_grad():
            weight.copy_(kept)
        engine.weights_changed()
    assert engine.generate(prompts, GREEDY, [0] * 8) == before


def test_an_optimizer_step_on_every_weight_reaches_the_engine(engine, prompts):
    """The tied embedding and head, the norms and the fused projections among them."""
    kept = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in engine.model.parameters():
                p.add_(torch.randn(p.shape, generator=generator) * p.std(), alpha=0.03)
        engine.weights_changed()
        assert_agrees(engine.model, prompts, engine.generate(prompts, Sampling(max_tokens=8), range(8)))
    finally:
        with torch.no_grad():
            for name, p in engine.model.named_parameters():
                p.copy_(kept[name])
        engine.weights_changed()


def test_a_stale_prefix_cache_is_caught(engine, prompts):
    long = [(prompt * 8)[:160] for prompt in prompts[:2]]  # over 128 tokens: a full block whatever its size
    engine.generate(long, GREEDY, [0, 0])
    weight = engine.model.get_parameter("model.layers.3.mlp.up_proj.weight")
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.mul_(1.5)
        stale = engine.generate(long, GREEDY, [0, 0])
        difference = (trainer_logprobs(engine.model, long, stale) - sampled_logprobs(stale)).abs()
        assert difference.mean() > 1e-3
        engine.weights_changed()
        assert_agrees(engine.model, long, engine.generate(long, GREEDY, [0, 0]))
    finally:
        with torch.no_grad():
            weight.copy_(kept)
        engine.weights_changed()


def test_more_prompt_tokens_than_a_pass_takes(engine, tokenizer):
    """Seeded requests over the batch limit: a prompt read in part would raise "CPU Generator does not use offset"."""
    stories = [
        f"Story {i}. Once upon a time {i} dragons lived in a castle" + " and counted sheep" * 25 for i in range(25)
    ]
    prompts = [story[:90] for story in tokenizer(stories)["input_ids"]]
    assert sum(map(len, prompts)) > engine.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    completions = engine.generate(prompts, Sampling(max_tokens=2), [seed_for(0, 0, i, 0) for i in range(25)])
    assert_agrees(engine.model, prompts, completions)


def test_the_base_is_restored_when_a_rollout_fails(engine, prompts):
    kept = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    model = add_lora(engine.model, LoraConfig(), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    merge = LoraMerge(model, engine.directory)
    weight = model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight

    def interrupted():
        with merge.in_engine():
            assert not torch.equal(weight, kept["model.layers.0.mlp.up_proj.weight"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.unload() is engine.model
    assert all(torch.equal(p, kept[name]) for name, p in engine.model.named_parameters())


def test_lora_on_a_base_that_is_not_the_checkpoint_is_refused(engine):
    weight = engine.model.get_parameter("model.layers.3.mlp.up_proj.weight")
    kept = weight.detach().clone()
    model = add_lora(engine.model, LoraConfig(), seed=0)
    try:
        with torch.no_grad():
            weight.mul_(2)
        with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp\.up_proj\.weight is not what"):
            engine.attach(model)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
        model.unload()


def test_the_process_keeps_its_threads_generators_and_dynamo(engine):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)
    assert not torch._dynamo.config.disable
    assert "TORCHDYNAMO_DISABLE" not in os.environ
    assert "LD_PRELOAD" not in os.environ  # vLLM's, for processes that it does not start here


def test_an_untested_version_is_refused(monkeypatch):
    vllm_private.check_version("0.32.0+cu129")
    with pytest.raises(ImportError, match=r"0\.99\.0 is untested.*0\.32\.0.*LONGGRPO_UNTESTED_VLLM=1"):
        vllm_private.check_version("0.99.0")
    monkeypatch.setenv("LONGGRPO_UNTESTED_VLLM", "1")
    vllm_private.check_version("0.99.0")
