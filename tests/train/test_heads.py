"""Models that do more to their logits than the head's product: engine and trainer score alike, and gradients follow."""

from __future__ import annotations

import shutil

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from longgrpo.config.run import build_config
from longgrpo.errors import ConfigError
from longgrpo.run.trainer import Trainer

HEADS = {
    "granite": {"logits_scaling": 4.0},
    "gemma3_text": {"final_logit_softcapping": 2.0, "head_dim": 8},
    "cohere": {"logit_scale": 0.25},
}


@pytest.fixture
def start(tree, tiny_model, tmp_path):
    def build(architecture, groups, **options):
        directory = shutil.copytree(tiny_model, tmp_path / "model")
        sizes = AutoConfig.from_pretrained(directory).to_dict()
        kept = {k: sizes[k] for k in sizes if k.endswith(("_size", "_layers", "_heads", "_token_id", "_embeddings"))}
        config = AutoConfig.for_model(architecture, **{**kept, "initializer_range": 0.2, **options})
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        return Trainer(build_config(tree | groups | {"model": {"path": str(directory)}}), tmp_path / "run")

    return build


@pytest.mark.parametrize(
    "groups",
    [
        {},
        {"rollout": {"engine": "transformers", "num_generations": 4, "sampling": {"top_k": 20}}},
        {"loss": {"kl": "exact_reverse", "beta": 0.1}},
    ],
    ids=["plain", "top_k", "exact_kl"],
)
@pytest.mark.parametrize("architecture", HEADS)
def test_engine_and_trainer_agree(architecture, groups, start):
    """The self-test is part of the run: the update raises the logprobs that the engine samples by."""
    summary = start(architecture, groups, **HEADS[architecture]).run()
    assert summary["engine_trainer_logprob_diff_max"] < 5e-4


def test_a_head_with_a_bias(start):
    """Phi's. It is scored, and refused where the exact KL would take the trained one for the reference's."""
    assert start("phi", {}).run()["engine_trainer_logprob_diff_max"] < 5e-4


def test_the_exact_kl_of_a_trained_bias_is_refused(start):
    with pytest.raises(ConfigError, match="a trained bias of the head"):
        start("phi", {"lora": None, "loss": {"kl": "exact_forward", "beta": 0.1}})


def test_capped_attention_is_refused(start):
    with pytest.raises(ConfigError, match="Gemma2ForCausalLM caps its attention's scores"):
        start("gemma2", {}, head_dim=8)
