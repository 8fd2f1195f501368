"""What an update asks of the device and of the head, counted on tensors of `meta`, which stands in for a GPU: a value
that is read there is a wait for everything before it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longgrpo.checks.counted import longest_rollout
from longgrpo.config.run import build_config
from longgrpo.memory.dryrun import MetaEngine
from longgrpo.train.loop import loss_and_backward, optimizer_step, score
from longgrpo.train.losses import PolicyLoss
from longgrpo.train.state import make_state
from longgrpo.train.update import plan_updates
from testing import ROOT

OWN = f"{ROOT / 'examples' / 'own_loss.py'}:grpo"


class Counted(TorchDispatchMode):
    """Reads of the device, copies of whole tensors to it, and calls of the head's ops."""

    def __init__(self):
        super().__init__()
        self.reads, self.copies, self.head = 0, 0, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            self.reads += 1
            return 1.0
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
            if args[0].is_meta and kwargs["device"].type == "cpu":
                self.reads += 1
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            self.copies += not args[0].is_meta and kwargs["device"].type == "meta" and args[0].numel() > 1
        name = func._schema.name
        if name.startswith("longgrpo::linear_"):
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            gradient = given.get("direction") or given.get("need_hidden")
            self.head[name.removeprefix("longgrpo::") + ("" if gradient else " (no gradient)")] += 1
        return func(*args, **kwargs)


@pytest.fixture
def counted(tree, tiny_model):
    def count(loss=None, lora=True, rollout=None, dtype="bfloat16", **train):
        options = {**tree, "loss": loss or {}, "train": {**tree["train"], **train, "token_budget": 100}}
        options["rollout"] = {**tree["rollout"], **(rollout or {})}
        options["model"] = {**tree["model"], "dtype": dtype}
        if not lora:
            del options["lora"]
        config = build_config(options)
        state = make_state(config, MetaEngine(Path(tiny_model), getattr(torch, dtype)), None)
        (update,) = plan_updates(config, longest_rollout(config, 256), torch.device("meta"), parts=1)
        loss = PolicyLoss(config)
        phases = {}
        for name, phase in {
            "score": lambda: score(config, state, [update]),
            "loss_and_backward": lambda: loss_and_backward(loss, state, update),
            "optimizer_step": lambda: optimizer_step(config, state, 1, update, 1.0),
        }.items():
            with Counted() as phases[name]:
                phase()
        return phases

    return count


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss": {"beta": 0.1}, "num_iterations": 2},
        {"loss": {"beta": 0.1, "kl": "exact_reverse"}},
        {"loss": {"importance_level": "sequence", "entropy_coef": 0.01}, "rollout": {"importance": "sequence_mask"}},
        {"loss": {"loss_type": "gmpo"}, "top_entropy_quantile": 0.5},
        {"num_iterations": 2, "off_policy_threshold": 0.1},
        {"loss": {"function": OWN}},
        {"dtype": "float16"},
        {"dtype": "float32"},
    ],
    ids=str,
)
def test_one_read_an_update_before_the_optimizer_steps(counted, options, lora):
    phases = counted(lora=lora, **options)
    assert {name: phase.reads for name, phase in phases.items()} == {
        "score": 0, "loss_and_backward": 1, "optimizer_step": 0
    }  # fmt: skip
    assert phases["loss_and_backward"].copies == 0  # the step's tensors are there


HEAD = "linear_grpo_loss"
SCORED, LOGP, AGAIN = "linear_logprob (no gradient)", "linear_logprob", "linear_logprob_backward"


@pytest.mark.parametrize(
    ("options", "scored", "trained"),
    [
        ({}, {}, {HEAD: 1}),
        ({"loss": {"beta": 0.1}}, {SCORED: 1}, {HEAD: 1}),
        ({"num_iterations": 2}, {SCORED: 1}, {HEAD: 1}),
        ({"loss": {"beta": 0.1}, "num_iterations": 2}, {SCORED: 2}, {HEAD: 1}),
        ({"loss": {"beta": 0.1, "kl": "exact_reverse"}}, {}, {HEAD: 1}),
        ({"top_entropy_quantile": 0.5}, {SCORED: 1}, {HEAD: 1}),
        ({"rollout": {"importance": "sequence_mask"}}, {}, {HEAD: 1}),
        ({"loss": {"function": OWN}}, {}, {LOGP: 1}),
    ],
    ids=str,
)
def test_passes_of_the_head(counted, options, scored, trained):
    """How many GEMMs linear_grpo_loss takes is counted in tests/loss."""
    phases = counted(**options)
    assert phases["score"].head == scored
    assert phases["loss_and_backward"].head == trained
    trained_head = counted(lora=False, **options)["loss_and_backward"].head
    own = "loss" in options and "function" in options["loss"]
    assert trained_head == ({SCORED: 1, AGAIN: 1} if own else trained)
