"""Training with rollout.bitwise: step after step engine and trainer give the sampled tokens the same logprobs, to the
bit. What cannot be exact is refused by name, before the engine is built."""

from __future__ import annotations

import json
import re

import pytest

from longgrpo._ops import fixed
from longgrpo.checks.selftest import selftest
from longgrpo.config.run import build_config, load_config
from longgrpo.errors import ConfigError
from longgrpo.run.trainer import Trainer
from testing import OWN_REWARDS, ROOT
from testing.families import FAMILIES, write_family

BF16 = pytest.param("bfloat16", marks=pytest.mark.skipif(not fixed.has_bf16(), reason="no AVX512-BF16"), id="bfloat16")
VIEWS = {"rank": 8, "alpha": 8, "mode": "views"}


def tree(directory, family="Llama", dtype="bfloat16", lora=VIEWS, **groups):
    """Prompts of 60 to 150 tokens, completions that end at one of several tokens, micro-batches of a few sequences."""
    rollout = {"engine": "vllm", "max_completion_length": 12, "max_model_len": 256, "kv_cache_gib": 0.05}
    rollout["sampling"] = {"stop_token_ids": [*range(5, 100, 9)]}
    return {
        "model": {"path": str(write_family(FAMILIES[family], directory / "model")), "dtype": dtype},
        "lora": lora,
        "task": {"name": "chain_sum", "parameters": {"max_terms": 8}, "eval_n": 0},
        "rewards": [{"function": f"{OWN_REWARDS}:digits"}],
        "rollout": rollout | {"num_generations": 4, "bitwise": True, "importance": "none"} | groups.pop("rollout", {}),
        "train": {"prompts_per_step": 3, "steps": 3, "learning_rate": 1e-2, "token_budget": 150, "probe_prompts": 0}
        | groups.pop("train", {}),
    } | groups


def differences(trainer):
    """Of each step: the largest difference of the sampled tokens' logprobs, the probe's, and the ratio's mean."""
    assert trainer.run()
    lines = (trainer.directory / "metrics.jsonl").read_text().splitlines()
    steps = [metrics for metrics in map(json.loads, lines) if metrics.get("step")]
    assert any(metrics["grad_norm"] > 0 for metrics in steps)
    names = ("engine_trainer_logprob_diff_max", "probe_logprob_diff", "importance_ratio_mean")
    return [tuple(metrics[name] for name in names) for metrics in steps]


class Seen:
    """The lengths of a run's prompts and completions, and how many of its requests were preempted."""

    def __init__(self, engine, monkeypatch):
        self.prompts, self.completions, self.preempted = set(), [], 0
        scheduler = engine.llm.llm_engine.engine_core.engine_core.scheduler
        self._generate, self._preempt = engine.generate, scheduler._preempt_request
        monkeypatch.setattr(engine, "generate", self.generate)
        monkeypatch.setattr(scheduler, "_preempt_request", self.preempt)

    def generate(self, prompts, *args, **options):
        completions = self._generate(prompts, *args, **options)
        self.prompts |= set(map(len, prompts))
        self.completions.append({len(completion.token_ids) for completion in completions})
        return completions

    def preempt(self, *args, **options):
        self.preempted += 1
        return self._preempt(*args, **options)


LONG = {"marks": pytest.mark.long}
CACHE = 0.00025  # GiB in bfloat16: for some of the requests


@pytest.mark.parametrize(
    ("family", "lora", "dtype", "threads", "budget"),
    [
        ("Llama", VIEWS, "bfloat16", 2, 150),
        ("Phi-3, Phi-4", None, "float32", 1, 400),
        pytest.param("Llama", None, "bfloat16", 1, 1, **LONG),
        pytest.param("Llama", VIEWS, "float32", 2, 400, **LONG),
        pytest.param("Llama", None, "float32", 2, 150, **LONG),
        pytest.param("Qwen3", VIEWS, "bfloat16", 1, 1, **LONG),
        pytest.param("Qwen3", None, "bfloat16", 2, 4000, **LONG),
        pytest.param("Qwen3", VIEWS, "float32", 2, 150, **LONG),
        pytest.param("Qwen3", None, "float32", 1, 1, **LONG),
        pytest.param("Phi-3, Phi-4", VIEWS, "bfloat16", 2, 4000, **LONG),
        pytest.param("Phi-3, Phi-4", None, "bfloat16", 2, 1, **LONG),
        pytest.param("Phi-3, Phi-4", VIEWS, "float32", 1, 150, **LONG),
        pytest.param("Gemma 3", VIEWS, "bfloat16", 2, 400, **LONG),
        pytest.param("Gemma 3", None, "bfloat16", 1, 150, **LONG),
        pytest.param("Gemma 3", VIEWS, "float32", 1, 4000, **LONG),
        pytest.param("Gemma 3", None, "float32", 2, 1, **LONG),
    ],
)
def test_no_step_has_a_difference(family, lora, dtype, threads, budget, tmp_path, monkeypatch, set_threads):
    """Prompts over 128 tokens, read from the prefix cache; completions of unequal lengths, some of them put back and
    computed again; micro-batches of one sequence to all."""
    pytest.importorskip("vllm")
    if dtype == "bfloat16" and not fixed.has_bf16():
        pytest.skip("no AVX512-BF16")
    set_threads(threads)
    train = {"steps": 20, "token_budget": budget, "learning_rate": 1e-2 if lora else 1e-3}
    cache = CACHE * (2 if dtype == "float32" else 1)
    config = tree(tmp_path, family, dtype, lora, train=train, rollout={"kv_cache_gib": cache})
    trainer = Trainer(build_config(config), tmp_path / "run")
    seen = Seen(trainer.loop.collector.engine, monkeypatch)
    assert differences(trainer) == [(0.0, 0.0, 1.0)] * 20
    assert max(seen.prompts) > 128
    assert max(map(len, seen.completions)) > 1
    assert seen.preempted


@pytest.mark.parametrize("dtype", [BF16])
def test_nor_with_offload_tiles_and_several_updates_and_the_selftest_passes(dtype, tmp_path):
    """The engine's logprobs are the old ones: the policy is not scored for them."""
    pytest.importorskip("vllm")
    config = tree(
        tmp_path, dtype=dtype, memory={"offload": True, "tiled_mlp": True, "tile_rows": 16}, train={"minibatches": 3}
    )
    trainer = Trainer(build_config(config), tmp_path / "run")
    assert not trainer.config.scores_policy
    assert {check.name: check.passed for check in selftest(trainer.loop, 3).checks if check.name == "agreement"} == {
        "agreement": True
    }
    assert [step[1] for step in differences(trainer)] == [0.0] * 3


@pytest.mark.long
@pytest.mark.parametrize("dtype", [BF16, "float32"])
@pytest.mark.parametrize(("mode", "threads"), [("views", 2), ("full", 1)])
def test_twenty_steps_of_smollm2(mode, threads, dtype, tmp_path, set_threads):
    lora = {"rank": 16, "alpha": 16, "mode": "views"} if mode == "views" else None
    pytest.importorskip("vllm")
    set_threads(threads)
    config = build_config(
        {
            "model": {"path": "smollm2-135m-instruct", "dtype": dtype},
            "lora": lora,
            "task": {"name": str(ROOT / "examples" / "sums.py") + ":rows", "eval_n": 0},
            "rewards": [{"function": f"{OWN_REWARDS}:digits"}],
            "rollout": {
                "engine": "vllm", "bitwise": True, "importance": "none", "num_generations": 4,
                "max_completion_length": 16, "max_model_len": 512, "kv_cache_gib": 0.25,
            },
            "train": {
                "prompts_per_step": 2, "steps": 20, "learning_rate": 1e-4 if lora else 1e-6, "token_budget": 512,
                "probe_prompts": 0,
            },
        }
    )  # fmt: skip
    assert differences(Trainer(config, tmp_path / "run")) == [(0.0, 0.0, 1.0)] * 20


REFUSED = {
    "rollout.engine = transformers": {"rollout": {"engine": "transformers"}},
    "model.dtype = float16": {"model": {"dtype": "float16"}},
    "model.quantization = nf4": {"model": {"quantization": "nf4"}},
    "lora.mode = merge": {"lora": {"mode": "merge"}},
    "rollout.kv_cache_dtype = fp8": {"rollout": {"kv_cache_dtype": "fp8"}},
    "rollout.repack_weights": {"rollout": {"repack_weights": True}},
    "rollout.sampling: a distribution that is cut": {"rollout": {"sampling": {"top_p": 0.9}}},
    "rollout.sampling: repetition_penalty": {"rollout": {"sampling": {"repetition_penalty": 1.1}}},
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_exact_is_refused_by_name(what, tmp_path):
    given = tree(tmp_path)
    for group, keys in REFUSED[what].items():
        given[group] = given[group] | keys
    with pytest.raises(ConfigError, match=re.escape(f"rollout.bitwise cannot be with {what}")):
        build_config(given)


def test_an_auto_mode_is_never_merge():
    from longgrpo.config.model import LoraConfig
    from longgrpo.rollout.adapters import choose_mode

    ranks = (1, 8, 16)
    assert choose_mode(LoraConfig(rank=8, alpha=8), mergeable=True, ranks=ranks) == "merge"
    assert choose_mode(LoraConfig(rank=8, alpha=8), mergeable=True, ranks=ranks, bitwise=True) == "views"
    assert choose_mode(LoraConfig(rank=8, alpha=16), mergeable=True, ranks=ranks, bitwise=True) == "copy"
    with pytest.raises(ValueError, match=r"rollout\.bitwise: lora\.rank must be one of 1, 8, 16, not 6"):
        choose_mode(LoraConfig(rank=6, alpha=6), mergeable=True, ranks=ranks, bitwise=True)


def test_a_config_without_it_reads_as_before(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text((ROOT / "examples" / "smollm2-sums.yaml").read_text())
    assert load_config(file, ["--task.name", str(ROOT / "examples" / "sums.py") + ":rows"]).rollout.bitwise is False
