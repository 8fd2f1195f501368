"""loss.function: a loss of the user's, against the built-in one that it writes out."""

from __future__ import annotations

import pytest
import torch

from longgrpo.config.run import build_config
from longgrpo.errors import ConfigError, TrainingError
from longgrpo.run.trainer import Trainer
from longgrpo.train.loop import loss_and_backward, step
from longgrpo.train.update import plan_updates
from testing import ROOT
from testing.steps import collected, rolled_out

GRPO = f"{ROOT / 'examples' / 'own_loss.py'}:grpo"


@pytest.fixture
def start(tree, tmp_path):
    def build(name="run", loss=None, **groups):
        options = {**tree, "loss": {"loss_type": "grpo", **(loss or {})}}
        options["task"] = {**tree["task"], "eval_n": 0}
        for group, values in groups.items():
            options[group] = values and {**options.get(group, {}), **values}
        return Trainer(build_config(options), tmp_path / name).loop

    return build


@pytest.fixture
def own(tmp_path):
    """A file with this function in it."""

    def write(body):
        path = tmp_path / "mine.py"
        path.write_text(f"import torch\n\ndef loss(t):\n    {body}\n")
        return f"{path}:loss"

    return write


def gradients(loop, update):
    _, metrics = loss_and_backward(loop.loss, loop.state, update)
    found = {name: gradient.clone() for name, gradient in loop.state.gradients.items()}
    loop.state.optimizer.zero_grad()
    return metrics, found


def test_grpo_written_out_is_the_built_in_loss(start):
    """In the second update of a rollout, so that ratios are clipped."""
    options = {"train": {"num_iterations": 2, "learning_rate": 0.02}, "rollout": {"importance": "none"}, "lora": None}
    built_in = start("built-in", **options)
    written = start("written", loss={"function": GRPO}, **options)
    _, update = rolled_out(built_in)
    loss_and_backward(built_in.loss, built_in.state, update)
    built_in.state.optimizer.step()
    built_in.state.optimizer.zero_grad()
    for name, parameter in written.state.parameters.items():
        parameter.data.copy_(built_in.state.parameters[name])
    expected, by_formula = gradients(built_in, update)
    metrics, by_hand = gradients(written, update)
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert metrics["policy_loss"] == pytest.approx(expected["policy_loss"], rel=1e-4)
    assert metrics["clipped"] > 0
    for name in ("ratio_max", "entropy", "engine_trainer_logprob_diff_max"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-3)
    for name, gradient in by_formula.items():
        torch.testing.assert_close(by_hand[name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())


def test_the_split_into_micro_batches_changes_nothing(start):
    found = []
    for budget in (10_000, 60):
        loop = start(str(budget), loss={"function": GRPO}, train={"token_budget": budget})
        _, update = rolled_out(loop)
        found.append((len(update.batches), *gradients(loop, update)))
    (one, whole, expected), (many, split, got) = found
    assert one == 1 < many
    assert split["loss"] == pytest.approx(whole["loss"], abs=1e-6)  # of advantages that sum to 0
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6)


def test_what_the_function_gets(start, own, capsys):
    spec = own(
        "n, s = len(t.logp), len(t.cu_seqlens) - 1\n"
        "    for x in (t.advantages, t.old_logp, t.ref_logp, t.sampling_logp, t.entropy, t.importance, t.mask):\n"
        "        assert x.shape == (n,)\n"
        "        assert not x.requires_grad\n"
        "    assert t.mask.all() and t.normalizer == s == 12\n"
        "    assert torch.equal(t.old_logp, t.logp.detach())\n"
        "    assert ((t.sampling_logp - t.logp).abs() < 5e-4).all()\n"
        "    assert set(t.importance.tolist()) == {0.0, 1.0}\n"
        "    return (t.logp * t.advantages).sum(), {'seen': n, 'low': t.entropy.min()}"
    )
    loop = start(loss={"function": spec, "beta": 0.1}, train={"top_entropy_quantile": 0.5})
    rollout, update = rolled_out(loop)
    _, metrics = loss_and_backward(loop.loss, loop.state, update)
    assert metrics["seen"] == rollout.bounds[-1]
    assert metrics["low"] >= 0


def test_completions_of_advantage_zero_reach_it(start, own):
    loop = start(loss={"function": own("return t.logp.sum(), {}")})
    rollout = collected(loop)
    rollout.advantages.zero_()
    (update,) = plan_updates(loop.config, rollout, torch.device("cpu"))
    assert update.trains
    assert loss_and_backward(loop.loss, loop.state, update)[0] > 0


def test_the_engines_ratio_is_its_own_affair(start, own):
    """A correction of the built-in loss changes nothing of it."""
    spec = own("return -(t.logp * t.advantages).sum() / t.normalizer, {}")
    found = []
    for importance in ("none", "token_truncate"):
        loop = start(importance, loss={"function": spec}, rollout={"importance": importance})
        _, update = rolled_out(loop)
        for batch in update.batches:
            batch.tokens.sampling_logp.sub_(0.5)
        found.append(gradients(loop, update)[1])
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_it_trains(start):
    loop = start(loss={"function": GRPO})
    before = {name: p.detach().clone() for name, p in loop.state.parameters.items()}
    assert step(loop, 1).metrics["grad_norm"] > 0
    assert any(not torch.equal(before[name], p) for name, p in loop.state.parameters.items())


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return t.logp.sum()", r"returned Tensor: must be \(loss, metrics\)"),
        ("return t.logp, {}", r"a loss of shape \[\d+\]: must be a scalar tensor"),
        ("return 1.0, {}", "a loss of shape float: must be a scalar tensor"),
        ("return t.logp.detach().sum(), {}", "does not depend on t.logp"),
        ("return t.logp.sum(), {'rows': t.logp}", r"metric 'rows' of shape \[\d+\]: must be a number"),
    ],
)
def test_what_it_must_return(start, own, body, said):
    loop = start(loss={"function": own(body)})
    with pytest.raises(TrainingError, match=rf"loss\.function '.*mine\.py:loss' returned .*{said}|{said}"):
        step(loop, 1)


def test_a_function_that_is_not_there_is_said_before_the_engine_starts(start, own):
    with pytest.raises(ConfigError, match=r"loss\.function .* has no function 'nothing'"):
        start(loss={"function": own("pass").replace(":loss", ":nothing")})
