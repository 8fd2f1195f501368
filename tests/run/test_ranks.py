"""Two ranks train as one does, whatever a config asks for: the same tokens, advantages, losses and gradients."""

from __future__ import annotations

import copy
import json
import math

import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file

from testing import OWN_DATA, OWN_REWARDS, OWN_TOOLS
from testing.ranks import run_ranks, train_all

OF_A_RANK = (
    "seconds/", "tokens_per_second/", "peak_", "measured_bytes/", "predicted_bytes/", "offload/", "calls/seconds",
)  # fmt: skip
ROUNDING = ("probe_logprob_diff", "engine_trainer_logprob_diff_")  # of float32 logprobs: an ulp of 4 is 5e-7
STEPS = 2


def changed(tree, **groups):
    tree = copy.deepcopy(tree)
    for name, values in groups.items():
        if values is None:
            tree.pop(name, None)
        elif isinstance(values, dict):
            tree[name] = tree.get(name, {}) | values
        else:
            tree[name] = values
    return tree


def rewards(*names):
    return [{"function": f"{OWN_REWARDS}:{name}", "weight": 1.0 + i} for i, name in enumerate(names)]


def variants(tree):
    one_sample_a_micro_batch = {"token_budget": 1}  # so that bfloat16 rounds the same sums, whoever makes them
    talking = {
        "task": {"tools": [f"{OWN_TOOLS}:later"], "tool_pattern": r"(?P<x>\d)", "eval_n": 4},
        "rewards": [{"function": f"{OWN_TOOLS}:letters"}],
        "rollout": {
            "max_completion_length": 150, "turn_tokens": 12, "max_turns": 4, "max_model_len": 256,
            "sampling": {"stop_token_ids": list(range(40, 70))},
        },
    }  # fmt: skip
    return {
        "adapter": tree,
        "full": changed(tree, lora=None),
        "full-bfloat16": changed(
            tree, lora=None, model={"dtype": "bfloat16"}, train=one_sample_a_micro_batch | {"probe_prompts": 0}
        ),
        "shard-gradients": changed(tree, lora=None, memory={"shard_gradients": True}, train={"token_budget": 60}),
        "shard-gradients-bfloat16": changed(
            tree,
            lora=None,
            model={"dtype": "bfloat16"},
            memory={"shard_gradients": True, "checkpoint": True},
            train=one_sample_a_micro_batch | {"probe_prompts": 0},
        ),
        "kl": changed(
            tree,
            lora=None,
            loss={"beta": 0.05, "loss_type": "grpo"},
            train={"num_iterations": 2, "off_policy_threshold": 1e-4, "minibatches": 2, "reference_sync_steps": 1},
        ),
        "nf4": changed(tree, model={"quantization": "nf4"}),
        "curriculum": changed(
            tree,
            task={
                "name": f"{OWN_DATA}:thirty",
                "parameters": {},
                "sampler": f"{OWN_DATA}:Harder",
                "eval_reward": f"{OWN_REWARDS}:digits",
            },
            rewards=[{"function": f"{OWN_REWARDS}:digits", "weight": 8.0}],  # solved at once
        ),
        "gdpo": changed(
            tree, rewards=rewards("digits", "digits_of_odd_sums"), train={"aggregation": "normalize_then_sum"}
        ),
        "async-isolated": changed(
            tree,
            rewards=[
                {"function": f"{OWN_REWARDS}:digits_async"},
                {"function": f"{OWN_REWARDS}:digits", "isolate": True, "name": "apart"},
            ],
        ),
        "batch-scale": changed(tree, train={"scale_rewards": "batch"}),
        "refills": changed(
            tree, rewards=rewards("digits_of_odd_sums"), train={"max_refills": 3, "scale_rewards": "none"}
        ),
        "top-entropy": changed(
            tree, loss={"entropy_coef": 0.01, "loss_type": "dr_grpo"}, train={"top_entropy_quantile": 0.3}
        ),
        "entropy-target": changed(tree, loss={"entropy_target": 10.0, "entropy_coef": 0.01}),
        "turns": changed(
            tree, **talking, train={"probe_prompts": 0, "advantage_level": "turn", "mask_truncated": True}
        ),
        "offload": changed(tree, lora=None, memory={"offload": True, "tiled_mlp": True}),
        "adafactor": changed(tree, lora=None, train={"optimizer": "adafactor"}),
        "few-groups": changed(
            tree, rewards=rewards("digits_of_odd_sums"), train={"prompts_per_step": 2, "top_entropy_quantile": 0.5}
        ),
        "no-gradient": changed(tree, rewards=rewards("constant"), train={"probe_prompts": 0}),
    }


@pytest.fixture(scope="module")
def trees(base_tree):
    tree = changed(
        base_tree,
        task={"eval_steps": 1, "eval_samples": 2, "eval_n": 5},
        train={"steps": STEPS, "prompts_per_step": 5, "save_steps": 1, "keep_checkpoints": STEPS},
        log={"to": []},
    )
    return variants(tree)


@pytest.fixture(scope="module")
def runs(trees, tmp_path_factory):
    """The folders of the runs on one rank, and on two."""
    folder = tmp_path_factory.mktemp("ranks")
    for world in (1, 2):
        ended = run_ranks(world, folder / "logs", train_all, trees, folder / str(world))
        assert [one.status for one in ended] == [0] * world, "\n".join(one.said[-3000:] for one in ended)
    return folder / "1", folder / "2"


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def states(run):
    return [load_file(saved / "state.safetensors") for saved in sorted((run / "checkpoints").iterdir())]


NAMES = list(variants({"task": {}, "train": {}, "rollout": {}}))


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_those_of_one_rank(runs, name):
    one, two = (records(run / name) for run in runs)
    assert [m["step"] for m in one] == [m["step"] for m in two]
    for a, b in zip(one, two, strict=True):
        more = {"seconds/collectives", "seconds/rank_skew"} if a["step"] else set()
        assert b.keys() - a.keys() == more
        assert a.keys() <= b.keys()
        for key in a.keys() - {key for key in a if key.startswith(OF_A_RANK)}:
            first = a["step"] < 2 and name != "kl"  # which has several updates in a step
            close = {"rel_tol": 1e-6 if first else 2e-5, "abs_tol": 1e-6 if key.startswith(ROUNDING) else 1e-7}
            assert a[key] == b[key] or math.isclose(a[key], b[key], **close), (a["step"], key, a[key], b[key])


@pytest.mark.parametrize("name", NAMES)
def test_completions_and_advantages_are_those_of_one_rank(runs, name):
    for step in range(1, STEPS + 1):
        one, two = (
            pyarrow.parquet.read_table(run / name / f"completions/step-{step:06d}.parquet").to_pydict() for run in runs
        )
        seconds = [table.pop("calls", None) for table in (one, two)]
        assert one == two
        assert (seconds[0] is None) == (seconds[1] is None)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_weights_are_those_of_one_rank(runs, name):
    """A checkpoint of two ranks has the form of one rank's; after step 1 AdamW's first moment is a tenth of the
    gradient."""
    for step, (one, two) in enumerate(zip(*(states(run / name) for run in runs), strict=True), start=1):
        assert one.keys() == two.keys()
        first = [key for key in one if key.startswith("exp_avg.")]
        square = sum(one[key].double().square().sum() for key in first)
        apart = sum((one[key].double() - two[key].double()).square().sum() for key in first)
        assert apart <= (1e-6 if step == 1 else 2e-5) ** 2 * square
        for key in one:
            # Where a gradient is nearly 0 the sign of AdamW's first steps is noise: at most a step of 0.01 each.
            torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-4)


def test_the_moments_are_not_zero(runs):
    state = states(runs[1] / "full")[0]
    assert sum(bool(state[key].any()) for key in state if key.startswith("exp_avg.")) > 10


def test_the_skew_between_ranks_is_measured(runs):
    for metrics in records(runs[1] / "full")[1:]:
        assert 0 < metrics["seconds/collectives"] < metrics["seconds/step"]
        assert metrics["seconds/rank_skew"] >= 0


@pytest.mark.parametrize("name", ["adapter", "turns"])
def test_evaluations_are_those_of_one_rank(runs, name):
    for file in ("eval_before.json", "eval_after.json", "evaluations/step-000001.json"):
        one, two = (json.loads((run / name / file).read_text()) for run in runs)
        assert one == two
