"""Each option of the algorithm against what it is said to do, on a tiny model."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from longgrpo.config.run import build_config
from longgrpo.config.train import LoopConfig
from longgrpo.run.trainer import Trainer
from longgrpo.train.loop import advantage, loss_and_backward, reward, roll_out, sample_prompts, score, step
from longgrpo.train.token_weights import near_policy
from testing import OWN_REWARDS as OWN


@pytest.fixture
def make(tree, tmp_path):
    """A policy in training, with these options of `train` and `loss`."""
    made = []

    def policy(loss=None, lora=True, rollout=None, function="digits", **train):
        options = {**tree, "loss": loss or {}, "rewards": [{"function": f"{OWN}:{function}"}]}
        options["train"] = {**tree["train"], **train}
        options["rollout"] = {**tree["rollout"], **(rollout or {})}
        options["task"] = {**tree["task"], "eval_n": 0}
        if not lora:
            del options["lora"]
        made.append(Trainer(build_config(options), tmp_path / f"run{len(made)}"))
        return made[-1].policy

    yield policy
    for trainer in made:
        trainer.policy.rewarding.close()


def rolled_out(policy, number=1):
    """Phases 1 to 5 of a step: all samples, and those with a gradient."""
    problems = sample_prompts(policy, policy.config.train.prompts_per_step)
    samples = roll_out(policy, problems, number)
    reward(policy, problems, samples, number)
    active = advantage(policy, samples)
    score(policy, active)
    return samples, active


def plain_logp(model, sample, temperature=1.0):
    """The oracle: [T, V] logprobs of a sample's completion, by transformers' own attention, one sequence at a time."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    packed = base.config._attn_implementation
    base.set_attn_implementation("eager")
    ids = torch.tensor([sample.prompt_ids + sample.completion.token_ids])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(sample.prompt_ids) - 1 : -1]
    base.set_attn_implementation(packed)
    return (logits / temperature).log_softmax(-1)


def taken(logp, sample):
    return logp.gather(1, torch.tensor(sample.completion.token_ids)[:, None])[:, 0]


def weights(policy):
    return {name: parameter.detach().clone() for name, parameter in policy.parameters.items()}


# ---- dynamic sampling


def counted(policy, monkeypatch):
    """The sizes of the engine's rollouts, without the probe of one prompt."""
    sizes, generate = [], policy.engine.generate

    def counting(prompts, *rest):
        sizes.extend([len(prompts)] if len(prompts) > 1 else [])
        return generate(prompts, *rest)

    monkeypatch.setattr(policy.engine, "generate", counting)
    return sizes


def test_groups_without_spread_are_replaced(make, monkeypatch):
    plain = step(make(function="digits_of_odd_sums"), 1)
    assert plain.metrics["groups_with_spread"] < 1
    policy = make(function="digits_of_odd_sums", max_refills=20)
    sizes = counted(policy, monkeypatch)
    refilled = step(policy, 1)
    groups = sum(sizes) // 4
    assert len(sizes) > 1
    assert refilled.metrics["groups_replaced"] == groups - 3
    assert refilled.metrics["groups_with_spread"] == pytest.approx(3 / groups)
    assert [sample.group for sample in refilled.samples] == [g for g in range(3) for _ in range(4)]
    assert len({id(problem) for problem in refilled.problems}) == 3
    for i, problem in enumerate(refilled.problems):
        group = refilled.samples[4 * i : 4 * i + 4]
        assert int(problem.columns["answer"]) % 2 == 1
        assert len({sample.rewards["digits_of_odd_sums"] for sample in group}) > 1
        text = policy.tokenizer.decode(group[0].prompt_ids).replace(" ", "")
        assert problem.question.replace(" ", "") in text


def test_refills_are_bounded(make, monkeypatch):
    policy = make(function="constant", max_refills=2)
    sizes = counted(policy, monkeypatch)
    observed = []
    monkeypatch.setattr(policy.stream, "observe", lambda problems, rewards: observed.append(tuple(rewards.shape)))
    metrics = step(policy, 1).metrics
    assert observed == [(3, 4)] * 3  # a curriculum sees what was replaced, too
    assert sizes == [12, 12, 12]
    assert (metrics["groups_with_spread"], metrics["groups_replaced"]) == (0, 6)


# ---- several updates


def test_every_update_counts_from_the_policy_that_sampled(make):
    """The gradient of a second pass, against PPO's formula written out and differentiated by torch."""
    policy = make(passes=2, lora=False, learning_rate=0.01, loss={"epsilon": 0.1, "epsilon_high": 0.3})
    samples, active = rolled_out(policy)
    old = [taken(plain_logp(policy.model, sample), sample) for sample in active]
    for sample, logp in zip(active, old, strict=True):
        assert torch.allclose(sample.old_logp, logp, atol=1e-4)
    loss_and_backward(policy, samples, active)
    policy.optimizer.step()
    policy.optimizer.zero_grad()
    metrics = loss_and_backward(policy, samples, active)

    tokens = sum(map(len, samples))
    expected, ratios = 0.0, []
    for sample, before in zip(active, old, strict=True):
        ratio = (taken(plain_logp(policy.model, sample), sample) - before).exp()
        clipped = ratio.clamp(0.9, 1.3)
        expected -= torch.minimum(ratio * sample.advantage, clipped * sample.advantage).sum().item() / tokens
        ratios.append(ratio)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-3)
    assert metrics["ratio_max"] == pytest.approx(torch.cat(ratios).max().item(), rel=1e-3)
    assert metrics["ratio_max"] > 1.3  # the policy did move, and beyond the clip
    assert metrics["engine_trainer_logprob_diff_max"] < 5e-4  # of the policy that sampled


def test_minibatches_train_on_every_group_once_a_pass(make, monkeypatch):
    from longgrpo.train import loop

    policy = make(passes=2, minibatches=3)
    parts, whole = [], loop.loss_and_backward

    def seen(policy, samples, active):
        parts.append({sample.group for sample in samples})
        assert {sample.group for sample in active} <= parts[-1]
        return whole(policy, samples, active)

    monkeypatch.setattr(loop, "loss_and_backward", seen)
    steps = []
    monkeypatch.setattr(policy.optimizer, "step", lambda step=policy.optimizer.step: steps.append(1) or step())
    metrics = step(policy, 1).metrics
    assert parts == [{0}, {1}, {2}] * 2
    assert len(steps) == 6
    assert metrics["ratio_min"] < 1 < metrics["ratio_max"]
    assert math.isfinite(metrics["loss"])


# ---- what is in the loss


def test_truncated_completions_are_left_out(make):
    policy = make(mask_truncated=True, rollout={"max_completion_length": 40}, prompts_per_step=6)
    samples, active = rolled_out(policy)
    whole = [sample for sample in samples if sample.completion.finish_reason == "stop"]
    assert 0 < len(whole) < len(samples)
    assert active == [sample for sample in whole if sample.advantage != 0]
    metrics = loss_and_backward(policy, samples, active)
    expected = -sum(len(sample) * sample.advantage for sample in active) / sum(map(len, whole))  # the ratio is 1
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
    assert metrics["tokens"] == sum(map(len, active))


def test_only_the_tokens_of_high_entropy_have_a_policy_gradient(make):
    policy = make(top_entropy_quantile=0.2)
    samples, active = rolled_out(policy)
    logps = [plain_logp(policy.model, sample) for sample in active]
    entropies = torch.cat([-(logp.exp() * logp).sum(-1) for logp in logps])
    kept = torch.cat([sample.policy_weight for sample in active])
    count = math.ceil(0.2 * len(entropies))
    assert kept.sum() == count
    assert entropies[kept == 1].min() > entropies[kept == 0].max() - 1e-4
    advantages = torch.cat([torch.full((len(sample),), sample.advantage) for sample in active])
    loss = loss_and_backward(policy, samples, active)["loss"]
    assert loss == pytest.approx(-(kept * advantages).sum().item() / sum(map(len, samples)), rel=1e-3, abs=1e-7)


def test_sequences_that_the_policy_has_left_have_no_policy_gradient():
    cu_seqlens = torch.tensor([0, 2, 3, 5], dtype=torch.int32)
    old_logp = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0])
    logp = torch.tensor([-1.0, -1.6, -3.0, -3.0, -1.0])  # moved by 0.3, 2 and 1 a token
    advantages = torch.tensor([-1.0, 1.0, -1.0])
    assert near_policy(0.5, logp, old_logp, advantages, cu_seqlens).tolist() == [1, 1, 1, 0, 0]
    assert near_policy(1.5, logp, old_logp, advantages, cu_seqlens).tolist() == [1, 1, 1, 1, 1]


def test_a_threshold_of_zero_silences_what_became_less_likely(make):
    plain, bounded = make(passes=3, learning_rate=0.05), make(passes=3, learning_rate=0.05, off_policy_threshold=0.0)
    for policy in (plain, bounded):
        step(policy, 1)
    assert any(not torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(bounded).values(), strict=True))


@pytest.mark.parametrize(
    "loss",
    [
        *({"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "luspo", "gmpo", "vespo")),
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"importance_level": "sequence"},
        {"delta": 4.0, "entropy_coef": 0.01},
        {"beta": 0.1, "kl_correction": True},
    ],
    ids=str,
)
def test_every_loss_trains_by_config(make, loss):
    policy = make(loss=loss, passes=2)
    before = weights(policy)
    metrics = step(policy, 1).metrics
    assert math.isfinite(metrics["loss"])
    assert metrics["grad_norm"] > 0
    assert any(not torch.equal(before[name], value) for name, value in weights(policy).items())


# ---- the reference


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("kind", ["exact_reverse", "exact_forward"])
def test_the_exact_kl_is_the_sum_over_the_vocabulary(make, lora, kind):
    policy = make(loss={"beta": 0.1, "kl": kind}, lora=lora, learning_rate=0.02)
    step(policy, 1)
    samples, active = rolled_out(policy, 2)
    divergence = []
    for sample in active:
        p = plain_logp(policy.model, sample)
        with policy.reference() as model:
            q = plain_logp(model, sample)
        p, q = (p, q) if kind == "exact_reverse" else (q, p)
        divergence.append((p.exp() * (p - q)).sum(-1))
    metrics = loss_and_backward(policy, samples, active)
    assert metrics["kl"] == pytest.approx(torch.cat(divergence).mean().item(), rel=1e-2)
    assert metrics["kl"] > 1e-5
    assert metrics["engine_trainer_logprob_diff_max"] < 5e-4


def test_reverse_kl_compares_runs_whatever_the_loss_estimates(make):
    policy = make(loss={"beta": 0.1, "kl": "article_forward"}, learning_rate=0.02)
    step(policy, 1)
    result = step(policy, 2)
    ratios = []
    for sample in result.samples:
        with policy.reference() as model:
            rows = plain_logp(model, sample)
        ids = torch.tensor(sample.completion.token_ids)
        ratios.append(torch.tensor(sample.completion.logprobs) - rows.gather(-1, ids[:, None])[:, 0])
    assert result.metrics["reverse_kl"] == pytest.approx(torch.cat(ratios).mean().item(), rel=1e-3)
    assert result.metrics["reverse_kl"] != pytest.approx(result.metrics["kl"], rel=0.1)


@pytest.mark.parametrize("lora", [True, False])
def test_a_reference_moves_towards_the_policy(make, lora):
    policy = make(loss={"beta": 0.05}, lora=lora, reference_sync_steps=2, reference_mixup=0.25, learning_rate=0.02)
    first = {name: tensor.clone() for name, tensor in policy.reference.tensors.items()}
    step(policy, 1)
    assert all(torch.equal(policy.reference.tensors[name], tensor) for name, tensor in first.items())
    step(policy, 2)
    for name, trained in weights(policy).items():
        assert torch.allclose(policy.reference.tensors[name], 0.25 * trained + 0.75 * first[name], atol=1e-6)


def test_the_policys_weights_stay_where_they_are_while_the_reference_is_scored(make):
    policy = make(loss={"beta": 0.05}, lora=False)
    before = {name: parameter.data_ptr() for name, parameter in policy.parameters.items()}
    held = weights(policy)
    step(policy, 1)
    with policy.reference() as model:
        untrained = dict(model.named_parameters())
        assert all(torch.equal(untrained[name], tensor) for name, tensor in held.items())
    assert {name: parameter.data_ptr() for name, parameter in policy.parameters.items()} == before
    assert any(not torch.equal(parameter, held[name]) for name, parameter in policy.parameters.items())


def test_a_run_whose_reference_moves_resumes_bit_for_bit(tree, tmp_path):
    tree["loss"] = {"beta": 0.05}
    tree["train"] |= {"reference_sync_steps": 1, "save_steps": 2, "keep_checkpoints": 9}
    tree["task"]["eval_n"] = 0
    Trainer(build_config(tree), tmp_path / "whole").run()
    tree["train"]["steps"] = 2
    Trainer(build_config(tree), tmp_path / "parts").run()
    Trainer.resume(tmp_path / "parts", ["--train.steps", "4"]).run()
    whole, parts = (
        load_file(tmp_path / run / "checkpoints/step-000004/state.safetensors") for run in ("whole", "parts")
    )
    assert any(name.startswith("weight.reference.") for name in whole)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


# ---- advantages and the learning rate


def test_the_scale_is_what_the_config_says(make):
    for scale in ("group", "batch", "none"):
        result = step(make(scale_rewards=scale), 1)
        rewards = torch.tensor([sample.rewards["digits"] for sample in result.samples]).view(3, 4)
        centered = rewards - rewards.mean(1, keepdim=True)
        divisor = {"group": rewards.std(1, keepdim=True), "batch": rewards.std(), "none": 1 - 1e-4}[scale]
        got = torch.tensor([sample.advantage for sample in result.samples]).view(3, 4)
        assert torch.allclose(got, centered / (divisor + 1e-4), atol=1e-4)


def test_the_learning_rate_follows_its_schedule():
    rates = {
        schedule: [
            LoopConfig(steps=12, learning_rate=1.0, warmup_steps=2, schedule=schedule).learning_rate_at(step)
            for step in (1, 2, 3, 8, 12)
        ]
        for schedule in ("constant", "linear", "cosine")
    }
    assert rates["constant"] == [0.5, 1, 1, 1, 1]
    assert rates["linear"] == pytest.approx([0.5, 1, 1, 0.5, 0.1])
    cosine = [(1 + math.cos(math.pi * done / 10)) / 2 for done in (0, 5, 9)]
    assert rates["cosine"] == pytest.approx([0.5, 1, *cosine])


def test_a_step_uses_the_rate_of_its_number(tree, tmp_path):
    tree["train"] |= {"schedule": "linear", "learning_rate": 0.01}
    tree["task"]["eval_n"] = 0
    Trainer(build_config(tree), tmp_path / "run").run()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["learning_rate"] for line in lines[1:]] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
