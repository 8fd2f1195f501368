"""rollout.bitwise: the engine's logprobs are the trainer's, to the bit, however the tokens were computed."""

from __future__ import annotations

import pytest
import torch

from longgrpo import linear_logprob
from longgrpo._ops import fixed
from longgrpo.config.model import LoraConfig
from longgrpo.model.head import head_of
from longgrpo.rollout import Sampling, vllm_private
from testing.agreement import packed, sampled_logprobs
from testing.engines import VOCABULARY, change, running, write_model

pytest.importorskip("vllm")

VIEWS = LoraConfig(rank=8, alpha=8, mode="views")
COPY = LoraConfig(rank=16, alpha=32, mode="copy")
BF16 = pytest.param("bfloat16", marks=pytest.mark.skipif(not fixed.has_bf16(), reason="no AVX512-BF16"), id="bfloat16")
DTYPES = ["float32", BF16]
# Longer than a block of the cache and than four, some alike at their beginning.
PROMPTS = [[3 + i % 3] * 140 + [7 + i] * (1 + 9 * i) for i in range(6)]
SAMPLED = Sampling(max_tokens=24, temperature=0.7, stop_token_ids=tuple(range(5, VOCABULARY, 23)))


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    made = {}

    def of(architecture):
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp(architecture)
            write_model(architecture, made[architecture])
        return made[architecture]

    return of


def trainer_logp(model, completions, temperature, prompts=None):
    hidden, target = packed(model, prompts or PROMPTS, completions)
    head = head_of(model)
    with torch.no_grad():
        return linear_logprob(hidden, head.weight, target, temperature=temperature, **head.options).logp


def share(engine, model):
    from longgrpo.model.packed_attention import use_packed_attention

    use_packed_attention(model)
    engine.shared.use_in(model)
    change(model, 0.02)
    engine.weights_changed()


def assert_equal(engine, model):
    completions = engine.generate(PROMPTS, SAMPLED, range(len(PROMPTS)))
    again = engine.generate(PROMPTS, SAMPLED, range(len(PROMPTS)))  # from the prefix cache
    assert again == completions
    assert len({len(c.token_ids) for c in completions}) > 1
    assert torch.equal(trainer_logp(model, completions, 0.7), sampled_logprobs(completions))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lora", [VIEWS, None], ids=["views", "full"])
@pytest.mark.parametrize(
    "architecture", ["llama", *(pytest.param(a, marks=pytest.mark.long) for a in ("qwen3", "phi3", "gemma3_text"))]
)
def test_engine_and_trainer_give_the_same_bits(directories, architecture, lora, dtype):
    with running(directories(architecture), lora, dtype, bitwise=True) as (engine, model):
        share(engine, model)
        assert_equal(engine, model)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
def test_so_does_an_adapter_that_is_copied(directories, dtype):
    with running(directories("llama"), COPY, dtype, bitwise=True) as (engine, model):
        share(engine, model)
        assert_equal(engine, model)


@pytest.mark.parametrize("dtype", [BF16])
def test_so_do_requests_that_are_preempted(directories, dtype, monkeypatch):
    """A cache for three of six requests: some are put back and computed again, prompt and what was sampled as one."""
    with running(directories("llama"), VIEWS, dtype, bitwise=True, kv_cache_gib=0.0003, max_model_len=256) as (
        engine,
        model,
    ):
        share(engine, model)
        scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
        preempted = []
        preempt = scheduler._preempt_request
        monkeypatch.setattr(scheduler, "_preempt_request", lambda *a, **k: (preempted.append(1), preempt(*a, **k))[1])
        long = Sampling(max_tokens=60, ignore_eos=True)
        completions = engine.generate(PROMPTS, long, range(len(PROMPTS)))
        assert preempted
        assert torch.equal(trainer_logp(model, completions, 1.0), sampled_logprobs(completions))


def test_without_it_an_engine_after_one_with_it_runs_its_own_operators(directories):
    def operators():
        with running(directories("llama"), VIEWS) as (engine, _):
            module = vllm_private.engine_module(engine.llm)
            assert engine.shared is None
            found = {n: type(m).__name__ for n, m in vllm_private.operators(module).items()}
            return found, engine.generate(PROMPTS, SAMPLED, range(len(PROMPTS)))

    before = operators()
    with running(directories("llama"), VIEWS, bitwise=True) as (engine, model):
        share(engine, model)
        engine.generate(PROMPTS, SAMPLED, range(len(PROMPTS)))
    assert operators() == before


@pytest.mark.parametrize("dtype", [BF16])
def test_below_float32_the_engine_samples_from_the_logits_that_are_scored(directories, dtype):
    """Without the option too: its logits are those of linear_logprob, and not rounded to the model's dtype."""
    with running(directories("llama"), None, dtype) as (engine, model):
        module = vllm_private.engine_module(engine.llm)
        states = []
        norm = module.model.norm.register_forward_hook(lambda m, args, output: states.append(output[0].clone()))
        (completion,) = engine.generate(PROMPTS[:1], Sampling(max_tokens=5, ignore_eos=True), [0])
        norm.remove()
        hidden = torch.stack([state[-1] for state in states[:5]])
        logp = linear_logprob(hidden, model.lm_head.weight, torch.tensor(completion.token_ids)).logp
        torch.testing.assert_close(torch.tensor(completion.logprobs), logp, rtol=1e-6, atol=2e-6)
