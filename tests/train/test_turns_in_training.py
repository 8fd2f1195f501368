"""Training on episodes: only what was sampled counts."""

from __future__ import annotations

import json

import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM

from longgrpo.config.run import build_config
from longgrpo.rollout import Completion
from longgrpo.rollout.protocol import Turn
from longgrpo.run.trainer import Trainer
from longgrpo.tasks.rewards import is_trainers
from longgrpo.tasks.sample import Sample
from longgrpo.train import loop as loop_module
from longgrpo.train.loop import advantage_of_turns
from longgrpo.train.losses import logprob
from longgrpo.train.packing import micro_batches, pack
from longgrpo.train.update import plan_updates
from testing import OWN_TOOLS
from testing.steps import rolled_out, rollout_of

CALLS = r"(?P<x>\d)"  # a random model writes digits now and then


@pytest.fixture
def talking(tree):
    """A random model whose every digit is a call."""
    tree["task"] |= {"tools": [f"{OWN_TOOLS}:later"], "tool_pattern": CALLS}
    tree["rewards"] = [{"function": f"{OWN_TOOLS}:letters"}]
    tree["rollout"] |= {"max_completion_length": 150, "turn_tokens": 12, "max_turns": 4, "max_model_len": 256}
    tree["train"] |= {"probe_prompts": 0, "prompts_per_step": 4}
    del tree["lora"]
    tree["task"]["eval_n"] = 4
    # The end token is one of 98: with more of them turns end.
    tree["rollout"]["sampling"] = {"stop_token_ids": list(range(40, 70))}
    return tree


@pytest.fixture
def loop(talking, tmp_path):
    trainer = Trainer(build_config(talking), tmp_path / "run")
    yield trainer.loop
    trainer.close()


@pytest.fixture
def reference(tiny_model):
    """transformers' own model, dense and in float64."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager", dtype=torch.float64)
    return model.requires_grad_(True)


def dense(model, sample):
    """logp of every token after the prompt, by a dense forward of this sequence only, [C]."""
    ids = torch.tensor(sample.prompt_ids + sample.completion.token_ids)
    logp = torch.log_softmax(model(ids[None]).logits[0], -1)[:-1].gather(1, ids[1:, None])[:, 0]
    return logp[len(sample.prompt_ids) - 1 :]


def mask_of(completion):
    mask = torch.zeros(len(completion.token_ids), dtype=torch.float64)
    for turn in completion.turns:
        mask[turn.begin : turn.end] = 1
    return mask


def test_engine_and_trainer_agree_on_later_turns(loop, reference):
    rollout, update = rolled_out(loop)
    later = [(i, turn) for i, s in enumerate(rollout.samples) for turn in s.completion.turns[1:]]
    assert len(later) > 5
    with torch.no_grad():
        for batch in update.batches:
            logp = logprob(loop.state.model, batch, loop.config.rollout.request()).logp
            assert (logp - batch.tokens.sampling_logp).abs().max() < 5e-4
        for sample in rollout.samples:
            mask = mask_of(sample.completion).bool()
            logp = dense(reference, sample)[mask]
            assert (logp - torch.tensor(sample.completion.logprobs)).abs().max() < 5e-4


@pytest.mark.parametrize("share_prompts", [True, False])
def test_the_gradient_is_the_dense_masked_ones(loop, reference, share_prompts):
    rollout, _ = rolled_out(loop)
    assert max(len(s.completion.turns) for s in rollout.samples) > 2
    generator = torch.Generator().manual_seed(1)
    rollout.advantages = torch.randn(rollout.advantages.shape, generator=generator)
    model = loop.state.model
    tokens = sum(map(len, rollout.samples))
    batches = micro_batches(rollout, range(len(rollout.samples)), 200, share_prompts=share_prompts)
    for batch in batches:
        loop.loss(model, None, batch, float(tokens)).loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    total = torch.zeros((), dtype=torch.float64)
    for sample, advantage in zip(rollout.samples, rollout.advantages.flatten(), strict=True):
        logp = dense(reference, sample)
        total = total - ((logp - logp.detach()).exp() * advantage * mask_of(sample.completion)).sum() / tokens
    total.backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    error = torch.stack([(got[name] - expected[name]).norm() for name in got]).norm()
    assert norm > 0
    assert error / norm < 1e-5


def test_only_sampled_tokens_reach_loss_normalizer_and_metrics(loop):
    rollout, update = rolled_out(loop)
    sampled = [token for s in rollout.samples for token in s.completion.sampled_ids]
    given = sum(len(s.completion.token_ids) for s in rollout.samples) - len(sampled)
    assert given > 0
    assert rollout.token_ids.tolist() == sampled
    assert rollout.sampling_logp.tolist() == pytest.approx([x for s in rollout.samples for x in s.completion.logprobs])
    assert torch.cat([batch.target for batch in update.batches]).numel() <= len(sampled)
    rollout.advantages.fill_(1.0)
    (update,) = plan_updates(loop.config, rollout, torch.device("cpu"), parts=1)
    assert update.normalizer == len(sampled)
    assert torch.cat([batch.target for batch in update.batches]).tolist() == sampled
    assert all(len(batch.rows) == len(batch.target) for batch in update.batches)


def test_packing_reads_given_tokens_and_predicts_none_of_them():
    tokens = [10, 11, 20, 21, 12, 22, 13, 14]  # those from 20 on were given
    turns = (Turn(0, 2), Turn(4, 5), Turn(6, 8))
    talk = Sample(0, [1, 2], Completion(tokens, [0.0] * 5, "stop", None, turns), "")
    plain = Sample(0, [1, 2], Completion([30, 31], [0.0] * 2, "stop"), "")
    alone = pack(rollout_of([talk]), [0])
    assert alone.packed.input_ids.tolist() == [1, 2, *tokens[:-1]]
    assert alone.target.tolist() == [10, 11, 12, 13, 14]
    for batch in (alone, pack(rollout_of([talk, plain]), [0, 1]), pack(rollout_of([plain, talk]), [0, 1])):
        before = batch.packed.input_ids[batch.rows].tolist()
        pairs = list(zip(before, batch.target.tolist(), strict=True))
        for pair in [(2, 10), (10, 11), (21, 12), (22, 13), (13, 14)]:
            assert pair in pairs
        assert not {20, 21, 22} & set(batch.target.tolist())


def test_a_failed_episode_is_in_neither_loss_nor_normalizer(talking, tmp_path):
    del talking["task"]["tools"], talking["task"]["tool_pattern"]
    talking["task"]["environment"] = f"{OWN_TOOLS}:Dies"
    talking["loss"] = {"beta": 0.1}  # which reaches samples without an advantage
    trainer = Trainer(build_config(talking), tmp_path / "run")
    loop = trainer.loop
    rollout, update = rolled_out(loop)
    failed = [s.failed for s in rollout.samples]
    assert 0 < sum(failed) < len(failed)
    assert rollout.rewards.isnan().flatten().tolist() == failed
    assert (rollout.advantages.flatten()[failed] == 0).all()
    left = [s for s in rollout.samples if not s.failed]
    assert [s for batch in update.batches for s in batch.samples] == left
    assert update.normalizer == sum(map(len, left))
    assert all(s.episode.environment.closed for s in rollout.samples)
    trainer.close()


def records(directory):
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    clocks = ("seconds", "tokens_per_second", "peak_", "calls/seconds", "measured_bytes")
    return [{k: v for k, v in line.items() if not k.startswith(clocks)} for line in lines]


@pytest.mark.parametrize("environment", [None, f"{OWN_TOOLS}:Guess"])
def test_a_run_and_the_same_run_resumed(talking, tmp_path, environment):
    talking["task"]["environment"] = environment
    talking["task"]["eval_sets"] = {"no_tool": {"n": 2, "turns": False}}
    Trainer(build_config(talking), tmp_path / "whole").run()
    talking["train"]["steps"] = 2
    Trainer(build_config(talking), tmp_path / "run").run()
    resumed = Trainer.resume(tmp_path / "run", ["--train.steps", "4"])
    summary = resumed.run()
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    assert {"eval_before", "eval_before_no_tool"} <= set(summary)
    last = records(tmp_path / "run")[-1]
    assert [name for name in last if not is_trainers(name)] == []  # a reward function may not log these
    assert last["turns/mean"] > 1
    assert last["turns/given_tokens"] > 0
    assert last["calls/mean"] > 0
    rows = pyarrow.parquet.read_table(tmp_path / "run/completions/step-000004.parquet").to_pylist()
    messages = [json.loads(row["messages"]) for row in rows]
    assert max(len(talk) for talk in messages) >= 3
    assert {message["role"] for talk in messages for message in talk} <= {"assistant", "tool", "user"}
    assert sum(len(json.loads(row["calls"])) for row in rows) / len(rows) == last["calls/mean"]


def test_the_gradient_by_turn_is_the_dense_ones(talking, tmp_path, reference):
    talking["train"]["advantage_level"] = "turn"
    talking["rewards"] = [{"function": f"{OWN_TOOLS}:letters_by_turn"}]
    trainer = Trainer(build_config(talking), tmp_path / "run")
    loop = trainer.loop
    rollout, _ = rolled_out(loop)
    rollout.turn_advantages = advantage_of_turns(loop.config, rollout, loop.collector.rewarding.rewards)
    assert max(map(len, rollout.turn_advantages)) > 2
    (update,) = plan_updates(loop.config, rollout, torch.device("cpu"), parts=1)
    loop_module.loss_and_backward(loop.loss, loop.state, update)
    total = torch.zeros((), dtype=torch.float64)
    for sample, own in zip(rollout.samples, rollout.turn_advantages, strict=True):
        logp = dense(reference, sample)
        for turn, advantage in zip(sample.completion.turns, own.tolist(), strict=True):
            part = logp[turn.begin : turn.end]
            total = total - ((part - part.detach()).exp() * advantage).sum() / update.normalizer
    total.backward()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}
    got = loop.state.gradients
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert norm > 0
    assert torch.stack([(got[name] - expected[name]).norm() for name in got]).norm() / norm < 1e-5
    trainer.close()
