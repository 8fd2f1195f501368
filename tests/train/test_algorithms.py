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
from longgrpo.train.loop import loss_and_backward, step
from testing import OWN_REWARDS as OWN
from testing.steps import rolled_out


@pytest.fixture
def make(tree, tmp_path):
    """A loop at work, with these options of `train` and `loss`."""
    made = []

    def build(loss=None, lora=True, rollout=None, function="digits", **train):
        options = {**tree, "loss": loss or {}, "rewards": [{"function": f"{OWN}:{function}"}]}
        options["train"] = {**tree["train"], **train}
        options["rollout"] = {**tree["rollout"], **(rollout or {})}
        options["task"] = {**tree["task"], "eval_n": 0}
        if not lora:
            del options["lora"]
        made.append(Trainer(build_config(options), tmp_path / f"run{len(made)}"))
        return made[-1].loop

    yield build
    for trainer in made:
        trainer.loop.collector.rewarding.close()


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


def weights(loop):
    return {name: parameter.detach().clone() for name, parameter in loop.state.parameters.items()}


def tokens_of(update, name):
    """[T]"""
    return torch.cat([getattr(batch.tokens, name) for batch in update.batches])


def trained(update):
    return [sample for batch in update.batches for sample in batch.samples]


# ---- dynamic sampling


def counted(loop, monkeypatch):
    """The sizes of the engine's rollouts, without the probe of one prompt."""
    engine = loop.collector.engine
    sizes, generate = [], engine.generate

    def counting(prompts, *rest):
        sizes.extend([len(prompts)] if len(prompts) > 1 else [])
        return generate(prompts, *rest)

    monkeypatch.setattr(engine, "generate", counting)
    return sizes


def test_groups_without_spread_are_replaced(make, monkeypatch):
    plain = step(make(function="digits_of_odd_sums"), 1)
    assert plain.metrics["groups_with_spread"] < 1
    loop = make(function="digits_of_odd_sums", max_refills=20)
    sizes = counted(loop, monkeypatch)
    refilled = step(loop, 1)
    groups, rollout = sum(sizes) // 4, refilled.rollout
    assert len(sizes) > 1
    assert refilled.metrics["groups_replaced"] == groups - 3
    assert refilled.metrics["groups_with_spread"] == pytest.approx(3 / groups)
    assert [sample.group for sample in rollout.samples] == [g for g in range(3) for _ in range(4)]
    assert len({id(problem) for problem in rollout.problems}) == 3
    for i, problem in enumerate(rollout.problems):
        assert int(problem.columns["answer"]) % 2 == 1
        assert len(rollout.rewards[0, i].unique()) > 1
        text = loop.collector.tokenizer.decode(rollout.samples[4 * i].prompt_ids).replace(" ", "")
        assert problem.question.replace(" ", "") in text


def test_refills_are_bounded(make, monkeypatch):
    loop = make(function="constant", max_refills=2)
    sizes = counted(loop, monkeypatch)
    observed = []
    monkeypatch.setattr(
        loop.collector.stream, "observe", lambda problems, rewards: observed.append(tuple(rewards.shape))
    )
    metrics = step(loop, 1).metrics
    assert observed == [(3, 4)] * 3  # a curriculum sees what was replaced, too
    assert sizes == [12, 12, 12]
    assert (metrics["groups_with_spread"], metrics["groups_replaced"]) == (0, 6)


# ---- several updates


def test_every_update_counts_from_the_policy_that_sampled(make):
    """The gradient of a second pass, against PPO's formula written out and differentiated by torch."""
    loop = make(num_iterations=2, lora=False, learning_rate=0.01, loss={"epsilon": 0.1, "epsilon_high": 0.3})
    rollout, update = rolled_out(loop)
    state, samples = loop.state, trained(update)
    advantages = tokens_of(update, "advantages").tolist()
    old = [taken(plain_logp(state.model, sample), sample) for sample in samples]
    torch.testing.assert_close(tokens_of(update, "old_logp"), torch.cat(old), atol=1e-4, rtol=0)
    loss_and_backward(loop.loss, state, update)
    state.optimizer.step()
    state.optimizer.zero_grad()
    _, metrics = loss_and_backward(loop.loss, state, update)

    expected, ratios = 0.0, []
    for sample, advantage, before in zip(samples, advantages, old, strict=True):
        ratio = (taken(plain_logp(state.model, sample), sample) - before).exp()
        expected -= torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.3) * advantage).sum().item()
        ratios.append(ratio)
    assert metrics["loss"] == pytest.approx(expected / rollout.bounds[-1], rel=1e-3)
    assert metrics["ratio_max"] == pytest.approx(torch.cat(ratios).max().item(), rel=1e-3)
    assert metrics["ratio_max"] > 1.3  # the policy did move, and beyond the clip
    assert metrics["engine_trainer_logprob_diff_max"] < 5e-4  # of the policy that sampled


def test_minibatches_train_on_every_group_once_a_pass(make, monkeypatch):
    from longgrpo.train import loop as module

    loop = make(num_iterations=2, minibatches=3)
    parts, whole = [], module.loss_and_backward

    def seen(loss, state, update):
        parts.append({sample.group for sample in trained(update)})
        return whole(loss, state, update)

    monkeypatch.setattr(module, "loss_and_backward", seen)
    steps, optimizer = [], loop.state.optimizer
    monkeypatch.setattr(optimizer, "step", lambda step=optimizer.step: steps.append(1) or step())
    metrics = step(loop, 1).metrics
    assert parts == [{0}, {1}, {2}] * 2
    assert len(steps) == 6
    assert metrics["ratio_min"] < 1 < metrics["ratio_max"]
    assert math.isfinite(metrics["loss"])


# ---- what is in the loss


def test_truncated_completions_are_left_out(make):
    loop = make(mask_truncated=True, rollout={"max_completion_length": 40}, prompts_per_step=6)
    rollout, update = rolled_out(loop)
    advantages = rollout.advantages.flatten().tolist()
    whole = [i for i, sample in enumerate(rollout.samples) if sample.completion.finish_reason == "stop"]
    active = [i for i in whole if advantages[i] != 0]
    assert 0 < len(whole) < len(rollout.samples)
    assert trained(update) == [rollout.samples[i] for i in active]
    _, metrics = loss_and_backward(loop.loss, loop.state, update)
    length = {i: len(rollout.samples[i]) for i in whole}
    expected = -sum(length[i] * advantages[i] for i in active) / sum(length.values())  # the ratio is 1
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
    assert metrics["tokens"] == sum(length[i] for i in active)


def test_only_the_tokens_of_high_entropy_have_a_policy_gradient(make):
    loop = make(top_entropy_quantile=0.2)
    rollout, update = rolled_out(loop)
    logps = [plain_logp(loop.state.model, sample) for sample in trained(update)]
    entropies = torch.cat([-(logp.exp() * logp).sum(-1) for logp in logps])
    kept = tokens_of(update, "importance")
    assert kept.sum() == math.ceil(0.2 * len(entropies))
    assert entropies[kept == 1].min() > entropies[kept == 0].max() - 1e-4
    lengths = torch.tensor([len(sample) for sample in trained(update)])
    advantages = tokens_of(update, "advantages").repeat_interleave(lengths)
    _, metrics = loss_and_backward(loop.loss, loop.state, update)
    expected = -(kept * advantages).sum().item() / rollout.bounds[-1]
    assert metrics["loss"] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_a_threshold_of_zero_silences_what_became_less_likely(make):
    options = {"num_iterations": 3, "learning_rate": 0.05}
    plain, bounded = make(**options), make(**options, off_policy_threshold=0.0)
    for loop in (plain, bounded):
        step(loop, 1)
    assert any(not torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(bounded).values(), strict=True))


@pytest.mark.parametrize(
    "loss",
    [
        *({"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "luspo", "gmpo", "vespo")),
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"importance_level": "sequence"},
        {"delta": 4.0, "entropy_coef": 0.01},
        {"beta": 0.1, "kl_correction": True},
        {"beta": 0.1, "kl": "exact_forward"},
    ],
    ids=str,
)
def test_every_loss_trains_by_config(make, loss):
    loop = make(loss=loss, num_iterations=2)
    before = weights(loop)
    metrics = step(loop, 1).metrics
    assert math.isfinite(metrics["loss"])
    assert metrics["grad_norm"] > 0
    assert any(not torch.equal(before[name], value) for name, value in weights(loop).items())


# ---- the reference


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("kind", ["exact_reverse", "exact_forward"])
def test_the_exact_kl_is_the_sum_over_the_vocabulary(make, lora, kind):
    loop = make(loss={"beta": 0.1, "kl": kind}, lora=lora, learning_rate=0.02)
    state = loop.state
    step(loop, 1)
    _, update = rolled_out(loop, 2)
    divergence = []
    for sample in trained(update):
        p = plain_logp(state.model, sample)
        with state.reference() as model:
            q = plain_logp(model, sample)
        p, q = (p, q) if kind == "exact_reverse" else (q, p)
        divergence.append((p.exp() * (p - q)).sum(-1))
    _, metrics = loss_and_backward(loop.loss, state, update)
    assert metrics["kl"] == pytest.approx(torch.cat(divergence).mean().item(), rel=1e-2)
    assert metrics["kl"] > 1e-5
    assert metrics["engine_trainer_logprob_diff_max"] < 5e-4


def test_reverse_kl_compares_runs_whatever_the_loss_estimates(make):
    loop = make(loss={"beta": 0.1, "kl": "article_forward"}, learning_rate=0.02)
    step(loop, 1)
    result = step(loop, 2)
    ratios = []
    for sample in result.rollout.samples:
        with loop.state.reference() as model:
            rows = plain_logp(model, sample)
        ratios.append(torch.tensor(sample.completion.logprobs) - taken(rows, sample))
    assert result.metrics["reverse_kl"] == pytest.approx(torch.cat(ratios).mean().item(), rel=1e-3)
    assert result.metrics["reverse_kl"] != pytest.approx(result.metrics["kl"], rel=0.1)


@pytest.mark.parametrize("lora", [True, False])
def test_a_reference_moves_towards_the_policy(make, lora):
    loop = make(loss={"beta": 0.05}, lora=lora, reference_sync_steps=2, reference_mixup=0.25, learning_rate=0.02)
    reference = loop.state.reference
    first = {name: tensor.clone() for name, tensor in reference.tensors.items()}
    step(loop, 1)
    assert all(torch.equal(reference.tensors[name], tensor) for name, tensor in first.items())
    step(loop, 2)
    for name, value in weights(loop).items():
        assert torch.allclose(reference.tensors[name], 0.25 * value + 0.75 * first[name], atol=1e-6)


def test_the_policys_weights_stay_where_they_are_while_the_reference_is_scored(make):
    loop = make(loss={"beta": 0.05}, lora=False)
    parameters = loop.state.parameters
    before = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    held = weights(loop)
    step(loop, 1)
    with loop.state.reference() as model:
        untrained = dict(model.named_parameters())
        assert all(torch.equal(untrained[name], tensor) for name, tensor in held.items())
    assert {name: parameter.data_ptr() for name, parameter in parameters.items()} == before
    assert any(not torch.equal(parameter, held[name]) for name, parameter in parameters.items())


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
        rollout = step(make(scale_rewards=scale), 1).rollout
        rewards = rollout.rewards[0]
        centered = rewards - rewards.mean(1, keepdim=True)
        divisor = {"group": rewards.std(1, keepdim=True), "batch": rewards.std(), "none": 1 - 1e-4}[scale]
        assert torch.allclose(rollout.advantages.double(), centered / (divisor + 1e-4), atol=1e-4)


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
