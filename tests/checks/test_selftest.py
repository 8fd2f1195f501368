"""The self-test passes a run that can learn, leaves no trace on it, and names each planted fault."""

from __future__ import annotations

import copy
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from longgrpo.checks.selftest import selftest
from longgrpo.config.run import build_config
from longgrpo.run.trainer import Trainer
from longgrpo.train import loop
from longgrpo.train import policy as policy_module
from testing import OWN_REWARDS

CHECKS = {
    "end token", "seeds", "spread", "agreement", "advantages", "trainable", "gradient", "weights", "update", "engine",
}  # fmt: skip


@pytest.fixture
def policy(tree, tmp_path):
    """At a temperature, with a KL term: every check has something to look at."""

    def build(**groups):
        tree["rollout"] |= {"temperature": 0.7, **groups.pop("rollout", {})}
        tree["loss"] = {"beta": 0.05, **groups.pop("loss", {})}
        return Trainer(build_config(tree | groups), tmp_path / "run").policy

    return build


def outcome(policy):
    return {check.name: check for check in selftest(policy, 4).checks}


def failed(policy):
    return {name: f"{check.seen}; {check.remedy}" for name, check in outcome(policy).items() if not check.passed}


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 4}, None])
def test_a_run_that_can_learn_passes_and_is_left_as_it_was(policy, lora):
    policy = policy(lora=lora)
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}
    random_state, position = torch.get_rng_state(), copy.deepcopy(policy.stream.state)
    checks = outcome(policy)
    assert checks.keys() == CHECKS | {"reference", "kl"}
    assert all(check.passed for check in checks.values())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in policy.parameters.items())
    assert not policy.optimizer.state
    assert torch.equal(torch.get_rng_state(), random_state)
    assert policy.stream.state == position


def test_without_a_kl_term_there_is_no_reference_to_look_at(policy):
    checks = outcome(policy(loss={"beta": 0.0}))
    assert checks.keys() == CHECKS
    assert all(check.passed for check in checks.values())


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "cispo", "sapo", "vespo", "luspo", "gmpo"])
def test_every_loss_passes(policy, loss_type):
    assert not failed(policy(loss={"loss_type": loss_type, "epsilon_high": 5.0 if loss_type == "cispo" else 0.2}))


@pytest.mark.parametrize(
    "kl", ["k1", "abs", "k2", "k3_plus", "forward", "forward_unbiased", "article_reverse", "article_forward"]
)
def test_every_kl_estimator_passes(policy, kl):
    assert not failed(policy(loss={"kl": kl}))


@pytest.mark.parametrize("rate", [1e-6, 1e-1])
def test_small_and_large_rates_pass(policy, tree, rate):
    tree["train"]["learning_rate"] = rate
    assert not failed(policy())


# ---- planted faults
def test_an_adapter_that_never_reaches_the_engine(policy):
    policy = policy()
    policy.engine._attached = copy.deepcopy(policy.engine._attached)
    assert "never reached it" in failed(policy)["engine"]


def test_a_cache_that_outlives_the_update(policy):
    """The engine begins to decode from keys and values of the prompt that the weights before the update made."""
    policy = policy()
    stale = copy.deepcopy(policy.engine._attached)
    generate = policy.engine._attached.generate

    def with_old_keys(input_ids, attention_mask, **options):
        cache = stale(input_ids[:, :-1], attention_mask=attention_mask[:, :-1], use_cache=True).past_key_values
        return generate(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, **options)

    policy.engine._attached.generate = with_old_keys
    stale.get_base_model().set_attn_implementation("sdpa")
    assert "prefix cache" in failed(policy)["engine"]


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
        assert not failed(trainer.policy)
        trainer.policy.engine.drop_caches = lambda: None
        assert "prefix cache" in failed(trainer.policy)["engine"]
    finally:
        trainer.close()


def test_a_constant_reward(policy):
    assert "nothing to learn" in failed(policy(rewards=[{"function": f"{OWN_REWARDS}:constant"}]))["spread"]


def test_a_reward_that_is_not_a_number(policy):
    assert "returned nan" in failed(policy(rewards=[{"function": f"{OWN_REWARDS}:nan"}]))["rewards"]


def test_one_seed_for_all(policy, monkeypatch):
    monkeypatch.setattr(loop, "seed_for", lambda *_: 0)
    assert "with one seed" in failed(policy())["seeds"]


def test_the_sign_of_the_advantage(policy, monkeypatch):
    right = loop.advantages
    monkeypatch.setattr(loop, "advantages", lambda *arguments: -right(*arguments))
    assert "worse completion" in failed(policy())["advantages"]


def test_the_sign_of_the_loss(policy, monkeypatch):
    right = loop.grpo_loss
    monkeypatch.setattr(loop, "grpo_loss", lambda logp, advantages, **rest: right(logp, -advantages, **rest))
    assert "less likely" in failed(policy())["update"]


def test_a_mask_shifted_by_one(policy, monkeypatch):
    right = policy_module.micro_batches

    def shifted(*arguments, **options):
        return [replace(batch, rows=(batch.rows - 1).clamp(min=0)) for batch in right(*arguments, **options)]

    monkeypatch.setattr(policy_module, "micro_batches", shifted)
    assert "different tokens" in failed(policy())["agreement"]


def test_a_temperature_missing_in_the_scoring(policy, monkeypatch):
    right = policy_module.linear_logprob
    monkeypatch.setattr(
        policy_module, "linear_logprob", lambda *a, temperature, **rest: right(*a, temperature=1.0, **rest)
    )
    assert "different temperatures" in failed(policy())["agreement"]


def test_a_reference_that_is_the_policy(policy):
    policy = policy()

    @contextmanager
    def itself():
        yield policy.model

    policy.reference = itself
    assert "follows the policy" in failed(policy)["reference"]


def test_a_frozen_adapter(policy):
    policy = policy()
    policy.model.requires_grad_(False)
    assert "adapter is frozen" in failed(policy)["trainable"]


def test_an_adapter_that_the_optimizer_does_not_hold(policy):
    policy = policy()
    policy.optimizer.param_groups[0]["params"] = [torch.nn.Parameter(torch.zeros(1))]
    assert "optimizer does not hold it" in failed(policy)["weights"]


def test_a_template_without_an_end_token(policy, tree):
    policy = policy()
    policy.tokenizer.chat_template = policy.tokenizer.chat_template.replace("<end>", "")
    assert "would learn to end" in failed(policy)["end token"]


def test_the_sign_of_the_kl_term(policy, monkeypatch):
    right = loop.grpo_loss

    def rewarded(*arguments, config, **rest):
        """policy loss - beta KL"""
        policy_loss = right(*arguments, config=replace(config, beta=0.0), **rest).loss
        result = right(*arguments, config=config, **rest)
        return result._replace(loss=2 * policy_loss - result.loss)

    monkeypatch.setattr(loop, "grpo_loss", rewarded)
    assert "sign is wrong" in failed(policy())["kl"]


def test_a_gradient_that_is_not_finite(policy):
    policy = policy()
    name, parameter = next(iter(policy.parameters.items()))
    parameter.register_hook(lambda gradient: gradient * torch.nan)
    assert name in failed(policy)["gradient"]
