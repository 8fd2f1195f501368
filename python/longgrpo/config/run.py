"""The config of a run: a tree of dataclasses, read from YAML and dotted overrides, validated by pydantic."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from longgrpo.config.check import require, require_sound
from longgrpo.config.document import read_yaml
from longgrpo.config.loss import LossConfig
from longgrpo.config.model import LoraConfig, ModelConfig
from longgrpo.config.overrides import explain, field_names, parse_overrides, set_key
from longgrpo.config.paths import make_absolute
from longgrpo.config.rollout import RolloutConfig
from longgrpo.config.task import RewardConfig, TaskConfig
from longgrpo.config.train import ADAPTER_RATE, FULL_RATE, LoopConfig, MemoryConfig
from longgrpo.config.watch import WatchConfig
from longgrpo.errors import ConfigError


@dataclass(frozen=True)
class LogConfig:
    """What a run logs besides metrics.jsonl."""

    to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=lambda: ["tensorboard"])
    """Trackers. wandb and trackio have to be installed; they read their own settings, such as WANDB_MODE."""
    project: str = "longgrpo"
    """The project name for wandb and trackio."""
    completions: int | None = None
    """Completions per step that are kept in completions/, with every reward and the advantage; default: all."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The config of a run. Without `lora` all weights are trained."""

    model: ModelConfig
    lora: LoraConfig | None = None
    task: TaskConfig
    rewards: list[RewardConfig]
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    log: LogConfig = field(default_factory=LogConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    output_dir: str | None = None
    """The run's directory, in a file relative to the file; default: runs/NAME in the current folder, after the name of
    the config file, numbered if that exists."""

    __pydantic_config__: ClassVar[dict[str, str]] = {
        "extra": "forbid"
    }  # reaches the dataclasses below that set none of their own

    def __post_init__(self) -> None:
        if self.train.learning_rate is None:
            rate = ADAPTER_RATE if self.lora else FULL_RATE
            object.__setattr__(self, "train", replace(self.train, learning_rate=rate))
        require_sound(self)
        generations = self.rollout.num_generations
        require(
            generations >= 2,
            f"rollout.num_generations = {generations}: a group of fewer than 2 completions has no advantage; take 8",
        )
        require(
            self.rollout.temperature > 0,
            f"rollout.temperature = {self.rollout.temperature}: must be above 0, or all of a group are equal",
        )
        require(len(self.rewards) > 0, "rewards is empty: name at least one reward function")
        require(
            not self.memory.shard_gradients or self.lora is None,
            "memory.shard_gradients with lora: every rank steps the whole adapter, which is small; leave it out",
        )
        require(
            self.model.quantization is None or self.lora is not None,
            f"model.quantization = {self.model.quantization} without lora: packed weights cannot be trained; "
            "add a lora group, or set model.quantization: null",
        )
        require(
            not self.task.eval_patience or self.best_is_evaluated,
            f"task.eval_patience counts evaluations, and train.best_metric = {self.best_metric!r} is of none: leave it "
            "out, or take eval/accuracy",
        )
        names = [reward.label for reward in self.rewards]
        require(
            len(set(names)) == len(names), f"rewards: a name stands twice in {names}; add up the weights or set `name`"
        )
        require(
            self.train.reference_sync_steps == 0 or self.loss.beta != 0,
            "train.reference_sync_steps is set and loss.beta is 0: there is no reference; set loss.beta above 0",
        )
        require(
            self.train.off_policy_threshold is None or self.train.updates > 1,
            "train.off_policy_threshold compares a rollout's later updates with its first, and train.num_iterations x "
            "train.minibatches = 1: there is none; leave it out",
        )
        require(
            not (self.loss.exact_kl and self.rollout.request().reshapes),
            f"loss.kl = {self.loss.kl!r} sums over the whole vocabulary, which rollout.sampling cuts: take kl: k3, or "
            "sample without top_p, top_k, min_p, allowed_token_ids and logit_bias",
        )
        require(
            self.train.advantage_level == "episode"
            or (
                self.task.takes_turns
                and not self.loss.needs_sequences
                and self.train.aggregation == "sum_then_normalize"
            ),
            "train.advantage_level: turn is about episodes with tools or an environment, a loss of tokens "
            "(importance_level: token, not vespo or gmpo) and aggregation: sum_then_normalize",
        )
        require(
            not (self.loss.function and self.loss.exact_kl),
            f"loss.function takes the reference's logprobs, and loss.kl = {self.loss.kl!r} has none: take kl: k3",
        )
        require(
            self.loss.detach or self.train.updates == 1,
            "loss.detach = false is about a rollout without old logprobs: set train.num_iterations and "
            "train.minibatches to 1",
        )
        if self.rollout.bitwise:
            self._check_bitwise()

    def _check_bitwise(self) -> None:
        """What is known by now not to be computed in the same order by both."""
        rollout, model = self.rollout, self.model
        sampling = rollout.not_recomputed or (["a distribution that is cut"] if rollout.request().reshapes else [])
        others = {
            "rollout.engine = transformers, whose attention is another": rollout.engine == "transformers",
            "model.dtype = float16; take bfloat16 or float32": model.dtype == "float16",
            f"model.quantization = {model.quantization}": model.quantization is not None,
            "lora.mode = merge, whose base is rounded where W x + B A x is not": bool(
                self.lora and self.lora.mode == "merge"
            ),
            f"rollout.kv_cache_dtype = {rollout.kv_cache_dtype}": rollout.kv_cache_dtype != "auto",
            "memory.attention_heads, whose attention is another": self.memory.attention_heads is not None,
            "rollout.repack_weights, which computes in another order": rollout.repack_weights,
            f"rollout.sampling: {', '.join(sampling)}": bool(sampling),
        }
        for other, has in others.items():
            require(not has, f"rollout.bitwise cannot be with {other}")

    @property
    def best_metric(self) -> str | None:
        """The metric of the best checkpoint: train.best_metric, or the held-out accuracy if it is measured."""
        return self.train.best_metric or ("eval/accuracy" if self.task.eval_steps else None)

    @property
    def best_is_evaluated(self) -> bool:
        """Whether that metric is of an evaluation."""
        return (self.best_metric or "").removeprefix("-").startswith("eval/")

    @property
    def scores_reference(self) -> bool:
        """Whether the reference's logprobs are computed before the updates; an exact KL needs none."""
        return self.loss.beta != 0 and not self.loss.exact_kl

    @property
    def scores_policy(self) -> bool:
        """Whether the policy's own logprobs are: as the old ones of several updates, or for the tokens' entropies. With
        rollout.bitwise the engine's are the old ones."""
        return (self.train.updates > 1 and not self.rollout.bitwise) or self.train.top_entropy_quantile < 1


def load_config(path: str | Path, overrides: list[str] | None = None) -> TrainConfig:
    """Reads a YAML file, applies overrides such as `--train.steps 5` or `--train.steps=5`, and validates the result.
    Relative paths are those of the file, or of the shell's folder (longgrpo.config.paths).

    Raises ConfigError, which names the file, the key, the value and the remedy.
    """
    path = Path(path)
    try:
        tree = read_yaml(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); is the path right?") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping with the keys {', '.join(field_names(TrainConfig))}")
    make_absolute(tree, path.parent)
    if isinstance(made := tree.get("output_dir"), str):  # which need not exist
        tree["output_dir"] = os.path.abspath(path.parent / Path(made).expanduser())
    for key, value in parse_overrides(overrides or []):
        set_key(tree, key, value)
    make_absolute(tree, Path())
    return build_config(tree, str(path))


def build_config(tree: dict[str, Any], source: str = "config") -> TrainConfig:
    """Validates a tree of plain values. Raises ConfigError that begins with `source`."""
    try:
        return TypeAdapter(TrainConfig).validate_python(tree)
    except ValidationError as error:
        lines = [explain(dict(problem), TrainConfig) for problem in error.errors()]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None


def dump_config(config: TrainConfig) -> str:
    """The whole config as YAML, defaults included and output_dir absolute; load_config reads it back."""
    tree = config_tree(config)
    if config.output_dir is not None:
        tree["output_dir"] = os.path.abspath(config.output_dir)
    return yaml.safe_dump(tree, sort_keys=False)


def config_tree(config: TrainConfig) -> dict[str, Any]:
    """The whole config as plain values."""
    tree: dict[str, Any] = TypeAdapter(TrainConfig).dump_python(config, mode="json")
    return tree
