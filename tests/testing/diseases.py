"""Healthy runs of a tiny model, and every disease that the watch knows, given to one: by its config, a reward function
or, where no config can, by a change of the trainer. The reward functions stand here as a user would have them."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longgrpo.config.run import build_config
from longgrpo.run.trainer import Trainer

HERE = Path(__file__)
END = 1  # testing.tokenizer's end token
DIGITS = [18, 19, 20, 21]  # "0" to "3"
LONGEST = 16


# ---- reward functions


def text_of(completion):
    return completion if isinstance(completion, str) else completion[-1]["content"]


def even(completions, **columns):
    """1 if the last character is an even digit."""
    return [float(text_of(reply)[-1:] in ("0", "2")) for reply in completions]


def low(completions, **columns):
    """The share of digits below 2; an empty reply has none."""
    return [sum(c in "01" for c in text_of(reply)) / max(len(text_of(reply)), 1) for reply in completions]


def ended(completion_ids, **columns):
    return [float(ids[-1] == END) for ids in completion_ids]


def long(completion_ids, **columns):
    return [len(ids) / LONGEST for ids in completion_ids]


def short(completion_ids, **columns):
    return [1 / len(ids) for ids in completion_ids]


def threes(completions, **columns):
    return [text_of(reply).count("3") / LONGEST for reply in completions]


def never(completions, **columns):
    return [0.0] * len(completions)


def of_the_prompt(answer, **columns):
    """The same for every completion of a prompt."""
    return [float(int(right) % 2) for right in answer]


def noise(completions, **columns):
    return [float(random.random() < 0.5) for _ in completions]


def evaluated_by_others(trainer):
    """Evaluations find the replies right that the reward does not pay."""
    means = []

    def noted(completions, **columns):
        values = even(completions)
        means.append(sum(values) / len(values))
        return values

    trainer.loop.collector.rewarding.rewards[0].function = noted
    trainer.evaluations.during = lambda *_: {"eval/accuracy": 1 - means[-1]}


def own(name: str, weight: float = 1.0) -> dict[str, Any]:
    return {"function": f"{HERE}:{name}", "weight": weight}


# ---- runs


def healthy(model: Path) -> dict[str, Any]:
    """A config as YAML gives it. The replies are digits; an untrained one has 5 tokens on average and seldom as many
    as LONGEST, and in each group some earn the reward."""
    return {
        "model": {"path": str(model)},
        "lora": {"rank": 4, "alpha": 4},
        "task": {
            "name": "chain_sum",
            "parameters": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
            "eval_n": 0,
        },
        "rewards": [own("even")],
        "rollout": {
            "engine": "transformers", "num_generations": 8, "max_completion_length": LONGEST,
            "sampling": {"allowed_token_ids": [END, *DIGITS]},
        },
        "train": {"steps": 12, "prompts_per_step": 4, "learning_rate": 3e-3, "probe_prompts": 0, "save_steps": 0},
        "log": {"to": [], "completions": 0},
    }  # fmt: skip


HEALTHY: dict[str, dict[str, Any]] = {
    "one reward": {},
    "two rewards and a KL term": {
        "rewards": [own("even"), own("low", 0.5)],
        "loss": {"beta": 0.02},
        "train": {"seed": 1, "num_iterations": 2},
    },
    "all weights, a bound on the length": {
        "lora": None,
        "rewards": [own("low"), {"function": "soft_overlong", "parameters": {"max_length": LONGEST, "buffer": 8}}],
        "train": {"seed": 2, "learning_rate": 1e-3},
    },
    "a ratio of sequences, in minibatches": {
        "loss": {"loss_type": "grpo", "importance_level": "sequence", "epsilon": 0.05},
        "train": {"seed": 3, "minibatches": 2},
    },
    "rewards normalized one by one": {
        "rewards": [own("even"), own("low")],
        "train": {"seed": 4, "aggregation": "normalize_then_sum"},
    },
    "advantages over the batch, CISPO": {
        "loss": {"loss_type": "cispo", "epsilon_high": 5.0},
        "train": {"seed": 5, "scale_rewards": "batch"},
    },
    "an entropy bonus and refills": {"loss": {"entropy_coef": 0.01}, "train": {"seed": 6, "max_refills": 2}},
    "a reference that follows, at a low rate": {
        "loss": {"beta": 0.05, "kl": "k1"},
        "train": {"seed": 7, "learning_rate": 3e-4, "reference_sync_steps": 10},
    },
}


@dataclass(frozen=True)
class Disease:
    """What is set in a healthy run's config to give it the finding of this name."""

    changes: dict[str, Any]
    begun: Callable[[dict[str, Any]], bool] = lambda metrics: True
    """Whether a step has it, by its own metrics; default: from the first step on."""
    give: Callable[[Trainer], None] = lambda trainer: None


class DriftingEngine:
    """An engine whose logprobs, from the sixth step on, are less and less those of the trainer's model."""

    def __init__(self, engine: Any) -> None:
        self._engine, self._calls = engine, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(
        self, prompts: Any, sampling: Any, seeds: Any, finished: Callable[[int, Any], None], turns: Any = None
    ) -> None:
        self._calls += 1
        error = 0.002 * max(self._calls - 5, 0)

        def drifted(i: int, completion: Any) -> None:
            finished(i, replace(completion, logprobs=[logp - error for logp in completion.logprobs]))

        self._engine.generate(prompts, sampling, seeds, drifted)


def drifting_engine(trainer: Trainer) -> None:
    """Only for what is trained on: the probe after an update would stop the run."""
    object.__setattr__(trainer.loop.collector, "engine", DriftingEngine(trainer.loop.collector.engine))


def fast(steps: int, learning_rate: float = 0.01, **train: Any) -> dict[str, Any]:
    """All weights are trained, with a learning rate that no one would take for the purpose."""
    return {"lora": None, "train": {"steps": steps, "learning_rate": learning_rate, **train}}


DISEASES: dict[str, Disease] = {
    "truncated": Disease({"rollout": {"max_completion_length": 4}}),
    "length_drift": Disease(
        fast(30) | {"rewards": [own("short")]}, lambda metrics: metrics["completion_length/mean"] <= 1.5
    ),
    "identical_replies": Disease({"rollout": {"sampling": {"top_k": 1}}}),
    "repetition": Disease(
        fast(30) | {"rewards": [own("threes")]}, lambda metrics: metrics["completions/repetition"] >= 0.6
    ),
    "no_spread": Disease({"rewards": [own("of_the_prompt")]}),
    "constant_reward": Disease({"rewards": [own("even"), own("never", 0.5)]}),
    "unrelated_reward": Disease({"rewards": [own("even"), own("noise", 0.01)]}),
    "held_out_falls": Disease(
        fast(20) | {"task": {"eval_n": 1, "eval_steps": 2}},
        lambda metrics: metrics["reward/mean"] >= 0.7,
        give=evaluated_by_others,
    ),
    "one_sided_advantages": Disease(
        {"rewards": [own("ended")], "rollout": {"max_completion_length": 4}, "train": {"mask_truncated": True}}
    ),
    "entropy_collapse": Disease(fast(30, 0.1) | {"rewards": [own("noise")]}, lambda metrics: metrics["entropy"] <= 0.1),
    "kl_runaway": Disease(fast(30, 0.03) | {"loss": {"beta": 1e-3}}, lambda metrics: metrics["reverse_kl"] >= 1),
    "clipped_gradient": Disease({"train": {"max_grad_norm": 1e-4}}),
    "clipped_ratio": Disease(
        fast(12, 0.03, num_iterations=4), lambda metrics: metrics["clip_low"] + metrics["clip_high"] >= 0.3
    ),
    "importance_cut": Disease(
        {"rollout": {"importance_cap": 1.001}, "train": {"steps": 16}},
        lambda metrics: metrics["importance_cut"] >= 0.05,
        give=drifting_engine,
    ),
    "engine_drift": Disease(
        {"train": {"steps": 16}},
        lambda metrics: metrics["engine_trainer_logprob_diff_mean"] >= 1e-3,
        give=drifting_engine,
    ),
    "zero_learning_rate": Disease({"train": {"learning_rate": 1e-20}}),
}


def config_of(model: Path, changes: dict[str, Any]) -> Any:
    return build_config(_joined(healthy(model), changes))


def _joined(tree: Any, changes: Any) -> Any:
    if not (isinstance(tree, dict) and isinstance(changes, dict)):
        return copy.deepcopy(changes)
    return tree | {key: _joined(tree.get(key), value) for key, value in changes.items()}


def give(disease: Disease, model: Path, directory: Path, **changes: Any) -> None:
    """Runs a tiny run that has the disease, in `directory`."""
    config = config_of(model, _joined(disease.changes, changes))
    trainer = Trainer(config, directory)
    disease.give(trainer)
    trainer.run()
