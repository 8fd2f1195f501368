"""The self-test passes a run that can learn, leaves no trace on it, and names each planted fault."""

from __future__ import annotations

import copy
import random
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from longgrpo.checks.selftest import selftest
from longgrpo.config.run import build_config
from longgrpo.run.trainer import Trainer
from longgrpo.train import collect, losses, update
from longgrpo.train import loop as loop_module
from testing import OWN_REWARDS

CHECKS = {
    "end token", "seeds", "spread", "agreement", "advantages", "trainable", "gradient", "weights", "update", "engine",
}  # fmt: skip


@pytest.fixture
def start(tree, tmp_path):
    """At a temperature, with a KL term: every check has something to look at."""

    def build(**groups):
        tree["rollout"] |= {"temperature": 0.7, **groups.pop("rollout", {})}
        tree["loss"] = {"beta": 0.05, **groups.pop("loss", {})}
        return Trainer(build_config(tree | groups), tmp_path / "run").loop

    return build


def outcome(loop):
    return {check.name: check for check in selftest(loop, 4).checks}


def failed(loop):
    return {name: f"{check.seen}; {check.remedy}" for name, check in outcome(loop).items() if not check.passed}


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 4}, None])
def test_a_run_that_can_learn_passes_and_is_left_as_it_was(start, lora):
    loop = start(lora=lora)
    state, stream = loop.state, loop.collector.stream
    before = {name: p.detach().clone() for name, p in state.parameters.items()}
    random_state, position = torch.get_rng_state(), copy.deepcopy(stream.state)
    checks = outcome(loop)
    assert checks.keys() == CHECKS | {"reference", "kl"}
    assert all(check.passed for check in checks.values())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in state.parameters.items())
    assert not state.optimizer.state
    assert torch.equal(torch.get_rng_state(), random_state)
    assert stream.state == position


def test_without_a_kl_term_there_is_no_reference_to_look_at(start):
    checks = outcome(start(loss={"beta": 0.0}))
    assert checks.keys() == CHECKS
    assert all(check.passed for check in checks.values())


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "cispo", "sapo", "vespo", "luspo", "gmpo"])
def test_every_loss_passes(start, loss_type):
    assert not failed(start(loss={"loss_type": loss_type, "epsilon_high": 5.0 if loss_type == "cispo" else 0.2}))


@pytest.mark.parametrize(
    "kl", ["k1", "abs", "k2", "k3_plus", "forward", "forward_unbiased", "article_reverse", "article_forward"]
)
def test_every_kl_estimator_passes(start, kl):
    assert not failed(start(loss={"kl": kl}))


@pytest.mark.parametrize("rate", [1e-6, 1e-1])
def test_small_and_large_rates_pass(start, tree, rate):
    tree["train"]["learning_rate"] = rate
    assert not failed(start())


def noisy(loop, seed, scale=0.25):
    """The engine's logprobs are off by as much as in a cache of 8 bits."""
    generate, draw = loop.collector.engine.generate, random.Random(seed)

    def with_noise(*arguments):
        found = generate(*arguments)
        return [replace(one, logprobs=[logp + draw.gauss(0, scale) for logp in one.logprobs]) for one in found]

    loop.collector.engine.generate = with_noise
    loop.probe.tolerance = 0.5
    return loop


@pytest.mark.parametrize("seed", range(4))
def test_an_engine_with_noise_of_its_own_passes(start, seed):
    """The update is lengthened until it stands out from the noise."""
    assert not failed(noisy(start(), seed))


# ---- planted faults
@pytest.mark.parametrize("seed", range(2))
def test_an_adapter_that_never_reaches_an_engine_with_noise_of_its_own(start, seed):
    loop = noisy(start(), seed)
    loop.collector.engine._attached = copy.deepcopy(loop.collector.engine._attached)
    assert "engine" in failed(loop)


def test_an_adapter_that_never_reaches_the_engine(start):
    loop = start()
    loop.collector.engine._attached = copy.deepcopy(loop.collector.engine._attached)
    assert "never reached it" in failed(loop)["engine"]


def test_a_cache_that_outlives_the_update(start):
    """The engine begins to decode from keys and values of the prompt that the weights before the update made."""
    loop = start()
    stale = copy.deepcopy(loop.collector.engine._attached)
    generate = loop.collector.engine._attached.generate

    def with_old_keys(input_ids, attention_mask, **options):
        cache = stale(input_ids[:, :-1], attention_mask=attention_mask[:, :-1], use_cache=True).past_key_values
        return generate(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, **options)

    loop.collector.engine._attached.generate = with_old_keys
    stale.get_base_model().set_attn_implementation("sdpa")
    assert "prefix cache" in failed(loop)["engine"]


def test_a_prefix_cache_that_vllm_does_not_drop(tree, tiny_model, tmp_path):
    """Its own cache, with prompts of more than a block. vLLM's attention knows no head as small as the tiny model's."""
    pytest.importorskip("vllm")
    from transformers import AutoConfig, AutoModelForCausalLM

    model = shutil.copytree(tiny_model, tmp_path / "model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model, head_dim=32)).save_pretrained(model)
    tree["model"]["path"] = str(model)
    tree["task"]["system_prompt"] = "You are a calculator. " * 7
    tree["rollout"] |= {"engine": "vllm", "kv_cache_gib": 0.05}
    trainer = Trainer(build_config(tree), tmp_path / "run")
    try:
        assert not failed(trainer.loop)
        trainer.loop.collector.engine.drop_caches = lambda: None
        assert "prefix cache" in failed(trainer.loop)["engine"]
    finally:
        trainer.close()


def test_a_constant_reward(start):
    assert "nothing to learn" in failed(start(rewards=[{"function": f"{OWN_REWARDS}:constant"}]))["spread"]


def test_a_reward_that_is_not_a_number(start):
    assert "returned nan" in failed(start(rewards=[{"function": f"{OWN_REWARDS}:nan"}]))["rewards"]


def test_one_seed_for_all(start, monkeypatch):
    monkeypatch.setattr(collect, "seed_for", lambda *_: 0)
    assert "with one seed" in failed(start())["seeds"]


def test_the_sign_of_the_advantage(start, monkeypatch):
    right = loop_module.advantages
    monkeypatch.setattr(loop_module, "advantages", lambda *arguments: -right(*arguments))
    assert "worse completion" in failed(start())["advantages"]


def test_the_sign_of_the_loss(start, monkeypatch):
    right = losses.linear_grpo_loss
    monkeypatch.setattr(
        losses, "linear_grpo_loss", lambda *a, advantages, **rest: right(*a, advantages=-advantages, **rest)
    )
    assert "less likely" in failed(start())["update"]


def test_a_mask_shifted_by_one(start, monkeypatch):
    right = update.pack

    def shifted(*arguments, **options):
        batch = right(*arguments, **options)
        return replace(batch, rows=(batch.rows - 1).clamp(min=0))

    monkeypatch.setattr(update, "pack", shifted)
    assert "different tokens" in failed(start())["agreement"]


def test_a_temperature_missing_in_the_scoring(start, monkeypatch):
    right = losses.linear_logprob
    monkeypatch.setattr(losses, "linear_logprob", lambda *a, temperature, **rest: right(*a, temperature=1.0, **rest))
    assert "different temperatures" in failed(start())["agreement"]


def test_a_reference_that_is_the_policy(start):
    loop = start()

    @contextmanager
    def itself():
        yield loop.state.model

    loop.state.reference = itself
    assert "follows the policy" in failed(loop)["reference"]


def test_a_frozen_adapter(start):
    loop = start()
    loop.state.model.requires_grad_(False)
    assert "adapter is frozen" in failed(loop)["trainable"]


def test_an_adapter_that_the_optimizer_does_not_hold(start):
    loop = start()
    loop.state.optimizer.param_groups[0]["params"] = [torch.nn.Parameter(torch.zeros(1))]
    assert "optimizer does not hold it" in failed(loop)["weights"]


def test_a_template_without_an_end_token(start, tree):
    loop = start()
    tokenizer = loop.collector.tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace("<end>", "")
    assert "would learn to end" in failed(loop)["end token"]


def test_the_sign_of_the_kl_term(start, monkeypatch):
    right = losses.linear_grpo_loss

    def rewarded(*arguments, config, **rest):
        """policy loss - beta KL"""
        policy_loss = right(*arguments, config=replace(config, beta=0.0), **rest).loss
        result = right(*arguments, config=config, **rest)
        return result._replace(loss=2 * policy_loss - result.loss)

    monkeypatch.setattr(losses, "linear_grpo_loss", rewarded)
    assert "sign is wrong" in failed(start())["kl"]


def test_a_gradient_that_is_not_finite(start):
    loop = start()
    name, parameter = next(iter(loop.state.parameters.items()))
    parameter.register_hook(lambda gradient: gradient * torch.nan)
    assert name in failed(loop)["gradient"]
