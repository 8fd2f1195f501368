"""A LoRA run of two steps with a tiny checkpoint of each family: it works, or is refused by name."""

from __future__ import annotations

import json
import re

import pytest

from longgrpo.checks.rehearsal import forecast_run
from longgrpo.config.run import build_config
from longgrpo.errors import ConfigError
from longgrpo.model.packed_attention import KEEPS_APART
from longgrpo.run.trainer import Trainer
from testing import OWN_REWARDS, ROOT
from testing.families import FAMILIES, write_family


def config_of(name, directory, engine, quantization=None):
    rollout = {"engine": engine, "max_completion_length": 8, "max_model_len": 128, "kv_cache_gib": 0.05}
    return build_config(
        {
            "model": {"path": str(write_family(FAMILIES[name], directory / "model")), "quantization": quantization},
            "lora": {"rank": 8, "alpha": 8},
            "task": {"name": "chain_sum", "parameters": {"max_terms": 2}, "eval_n": 2},
            "rewards": [{"function": f"{OWN_REWARDS}:digits"}],
            "rollout": rollout | {"num_generations": 4},
            "train": {"prompts_per_step": 2, "steps": 2, "learning_rate": 1e-3, "token_budget": 256},
        }
    )


def trained(config, directory, expected):
    """The trainer after its run; None if that is refused as it is `expected` to be."""
    if expected == "yes":
        trainer = Trainer(config, directory / "run")
        assert trainer.run()
        return trainer
    with pytest.raises(ConfigError, match=re.escape(expected)):
        Trainer(config, directory / "run")
    return None


@pytest.mark.parametrize("name", FAMILIES)
def test_with_the_transformers_engine(name, tmp_path):
    family = FAMILIES[name]
    config = config_of(name, tmp_path, "transformers")
    trainer = trained(config, tmp_path, family.transformers)
    if trainer:
        apart = getattr(trainer.loop.state.model.get_base_model(), KEEPS_APART)
        assert ("packed" if apart else "one by one") == family.packing
        forecast = forecast_run(config, 8, force=False)
        assert family.plan == ("none" if not forecast else "formulas" if forecast.shape.has_formulas else "counted")


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_in_four_bits(name, tmp_path):
    pytest.importorskip("bitsandbytes")
    trained(config_of(name, tmp_path, "transformers", "nf4"), tmp_path, FAMILIES[name].nf4)


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_with_vllm(name, tmp_path):
    pytest.importorskip("vllm")
    trained(config_of(name, tmp_path, "vllm"), tmp_path, FAMILIES[name].vllm)


@pytest.mark.long
def test_vllm_with_a_head_of_its_own_under_a_config_that_says_tied(tmp_path):
    pytest.importorskip("vllm")
    config = config_of("Llama", tmp_path, "vllm")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    trained(config, tmp_path, "yes")


def test_the_page_says_what_was_run():
    page = (ROOT / "docs" / "families.md").read_text()
    for name, family in FAMILIES.items():
        shown = [x if x == "yes" else "refused" for x in (family.transformers, family.vllm, family.nf4)]
        works = family.transformers == "yes"
        cells = [name, f"`{family.kind}`", *shown, *((family.packing, family.plan) if works else ("", ""))]
        assert f"| {' | '.join(cells)} |".replace("  ", " ") in page, name
