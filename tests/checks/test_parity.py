"""`longgrpo parity` finds the operator that differs, and no other; runs that compute alike are said to."""

from __future__ import annotations

import json

import pytest
import torch

from longgrpo import cli
from longgrpo.checks.parity import compare, difference, parity
from longgrpo.checks.parity_trace import Seen
from longgrpo.config.run import build_config, dump_config
from longgrpo.errors import ConfigError
from longgrpo.run.trainer import Trainer
from testing import OWN_REWARDS
from testing.families import FAMILIES, write_family


@pytest.fixture
def config(tmp_path):
    def build(engine="vllm", family="Llama", **groups):
        rollout = {"engine": engine, "max_completion_length": 8, "max_model_len": 256, "kv_cache_gib": 0.05}
        return build_config(
            {
                "model": {"path": str(write_family(FAMILIES[family], tmp_path / "model"))},
                "lora": {"rank": 8, "alpha": 8, "mode": "views"},
                "task": {"name": "chain_sum", "parameters": {"max_terms": 2}, "eval_n": 0},
                "rewards": [{"function": f"{OWN_REWARDS}:digits"}],
                "rollout": rollout | {"num_generations": 4} | groups.pop("rollout", {}),
            }
            | groups
        )

    return build


def test_the_first_operator_that_differs_is_named(config, tmp_path):
    pytest.importorskip("vllm")
    trainer = Trainer(config(), tmp_path / "run")
    try:
        before = parity(trainer.loop)
        act = trainer.loop.state.model.get_submodule("base_model.model.model.layers.1.mlp.act_fn")
        act.register_forward_hook(lambda module, args, output: output * 1.0625)
        after = parity(trainer.loop)
    finally:
        trainer.close()
    assert {run.what: run.equal for run in before.runs} | {"trainer, engine": False} == {
        run.what: run.equal for run in after.runs
    }
    was, now = ({operator.name: operator for operator in found.operators} for found in (before, after))
    assert was["act_fn"].equal == was["act_fn"].layers == 2
    assert now["act_fn"].equal == 1
    assert now["act_fn"].first == "model.layers.1.mlp.act_fn"
    assert now["act_fn"].share > 0.4
    assert now["act_fn"].largest == pytest.approx(0.0625, rel=0.1)
    del was["act_fn"], now["act_fn"]
    assert was == now, "each operator is given the engine's inputs"
    assert not after.equal
    assert after.logprob_diff_max > 10 * before.logprob_diff_max


def test_with_shared_operators_everything_is_equal(config, tmp_path):
    """Of Gemma, whose embedding scales in itself and vLLM's model after it."""
    pytest.importorskip("vllm")
    trainer = Trainer(config(family="Gemma 3", rollout={"bitwise": True}), tmp_path / "run")
    try:
        found = parity(trainer.loop)
    finally:
        trainer.close()
    assert found.equal, str(found)
    assert {"embed_tokens", "q_norm", "attn"} <= {operator.name for operator in found.operators}


def test_the_command_prints_json(config, tmp_path, capsys):
    pytest.importorskip("vllm")
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config(lora=None)))
    status = cli.main(["parity", str(file), "--dtype", "bfloat16", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == (0 if found["equal"] else 1)
    assert found["setting"]["dtype"] == "bfloat16"
    assert [operator["name"] for operator in found["operators"]] == [
        "embed_tokens", "input_layernorm", "qkv_proj", "rotary_emb", "attn", "o_proj", "post_attention_layernorm",
        "gate_up_proj", "act_fn", "down_proj", "norm", "logprob of the head",
    ]  # fmt: skip


def test_the_trainers_own_engine_is_refused(config, tmp_path):
    trainer = Trainer(config("transformers"), tmp_path / "run")
    try:
        with pytest.raises(ConfigError, match="the engine is transformers, which runs the trainer's own model"):
            parity(trainer.loop)
    finally:
        trainer.close()


def seen(output, first=0):
    return Seen(torch.arange(first, first + len(output)), (), output)


def test_only_common_positions_are_compared_in_the_order_of_the_operators():
    whole = {"a": seen(torch.zeros(5, 2)), "b": seen(torch.ones(5, 2))}
    assert compare("x", whole, {"a": seen(torch.zeros(2, 2), 3), "b": seen(torch.ones(2, 2), 3)}).equal
    other = torch.ones(2, 2)
    other[1, 0] = 1.5
    parting = compare("x", whole, {"b": seen(other, 3), "a": seen(torch.zeros(2, 2), 3)})
    assert (parting.operator, parting.position, parting.share) == ("b", 4, 0.25)
    assert parting.largest == pytest.approx(0.5 / 1.5)


def test_a_sign_of_zero_is_no_difference_and_a_nan_on_one_side_is():
    a = torch.tensor([[0.0, 1.0, float("nan")]])
    assert difference(a, torch.tensor([[-0.0, 1.0, float("nan")]]))[0] == 0
    assert difference(a, torch.tensor([[0.0, 1.0, 2.0]]))[0] == pytest.approx(1 / 3)
