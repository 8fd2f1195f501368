"""The config of a run: a tree of dataclasses, read from YAML and dotted overrides, validated by pydantic."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from longgrpo.loss.config import GRPOLossConfig
from longgrpo.model.load import ModelConfig
from longgrpo.model.lora import LoraConfig
from longgrpo.rollout.engine import RolloutConfig
from longgrpo.train.errors import ConfigError


@dataclass(frozen=True)
class TaskConfig:
    """The problems: a reasoning_gym task by name and its parameters."""

    name: str
    """A task of reasoning_gym, for example chain_sum."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Handed to the task; `size` is the number of different problems before they repeat."""
    seed: int = 0
    """Seed of the training problems."""
    system_prompt: str | None = None
    eval_n: int = 200
    """Number of held-out problems, different from each other and never trained on; 0: no evaluation."""
    eval_seed: int = 1_000_000_007
    """Seed of the held-out problems."""
    eval_reward: str = "score_answer"
    """The reward function that says whether a held-out problem is solved (>= 1)."""
    eval_prefill: str | None = None
    """A control: the untrained model is also evaluated with its reply begun by this template, filled from the columns
    and metadata of a problem, for example "{expression} ="."""

    def __post_init__(self) -> None:
        _require(self.eval_n >= 0, f"eval_n = {self.eval_n}: must be 0 (no evaluation) or more")


@dataclass(frozen=True)
class RewardConfig:
    """One reward function and its weight in the sum."""

    function: str
    """A built-in (score_answer, exact_answer, graded_error), package.module:function or path/to/file.py:function."""
    weight: float = 1.0


@dataclass(frozen=True)
class LoopConfig:
    """The loop and its optimiser."""

    steps: int = 50
    seed: int = 0
    """Seeds the adapter's first weights and every sampled completion."""
    prompts_per_step: int = 8
    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    scale_rewards: Literal["group", "none"] = "group"
    """What a group's centred rewards are divided by: their standard deviation, or nothing."""
    token_budget: int = 4096
    """Tokens of a packed micro-batch, prompts included: it bounds memory and never changes the result."""
    probe_prompts: int = 16
    """Prompts rolled out before step 1 to measure the share of groups with spread; 0: not measured."""
    save_steps: int = 25
    """A checkpoint after every so many steps, besides the last; 0: only the last."""
    keep_checkpoints: int = 2
    """The newest that are kept."""
    best_metric: str | None = None
    """The checkpoint of the step with the highest value of this metric is kept as well, for example reward/mean;
    with a minus before its name, the lowest."""
    log_completions: int = 4
    """Completions of each step written to completions.jsonl."""

    def __post_init__(self) -> None:
        for name in ("steps", "prompts_per_step", "token_budget", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, f"{name} = {getattr(self, name)}: must be at least 1")
        for name in ("warmup_steps", "probe_prompts", "save_steps", "log_completions"):
            _require(getattr(self, name) >= 0, f"{name} = {getattr(self, name)}: must not be negative")
        _require(self.learning_rate > 0, f"learning_rate = {self.learning_rate}: must be above 0")
        _require(self.max_grad_norm > 0, f"max_grad_norm = {self.max_grad_norm}: must be above 0 (.inf: no clipping)")


@dataclass(frozen=True)
class MemoryConfig:
    """What is traded for memory in the backward. The gradients stay the same."""

    offload: bool = False
    """Checkpoint every layer and keep its input in host memory until the backward wants it (longgrpo.offload)."""
    tiled_mlp: bool = False
    """Run the MLPs a tile of the sequence at a time (longgrpo.model.tiled_mlp)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that makes a run. Without `lora` all weights are trained."""

    model: ModelConfig
    lora: LoraConfig | None = None
    task: TaskConfig
    rewards: list[RewardConfig]
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: GRPOLossConfig = field(default_factory=GRPOLossConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    output_dir: str | None = None
    """Where the run lives; default runs/<name of the config file>, numbered if that exists."""

    __pydantic_config__: ClassVar[dict[str, str]] = {
        "extra": "forbid"
    }  # reaches the dataclasses below that set none of their own

    def __post_init__(self) -> None:
        generations = self.rollout.num_generations
        _require(
            generations >= 2,
            f"rollout.num_generations = {generations}: a group of fewer than 2 completions has no advantage; take 8",
        )
        _require(
            self.rollout.temperature > 0,
            f"rollout.temperature = {self.rollout.temperature}: must be above 0, or all of a group are equal",
        )
        _require(len(self.rewards) > 0, "rewards is empty: name at least one reward function")
        _require(
            not self.loss.exact_kl,
            f"loss.kl = {self.loss.kl!r}: the trainer scores the reference on the sampled tokens alone; take k3",
        )
        names = [reward.function for reward in self.rewards]
        _require(len(set(names)) == len(names), f"rewards: a function is named twice in {names}; add up its weights")
        _require(
            self.lora is not None or self.model.dtype == "float32",
            f"model.dtype = {self.model.dtype} without lora: AdamW on weights below float32 loses its small updates; "
            "set model.dtype: float32 or add a lora group",
        )


def load_config(path: str | Path, overrides: list[str] | None = None) -> TrainConfig:
    """Reads a YAML file, applies overrides such as `--train.steps 5` or `--train.steps=5`, and validates the result.

    Raises ConfigError, naming the file, the key, the value and the remedy.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); is the path right?") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping with the keys {', '.join(_fields(TrainConfig))}")
    for key, value in parse_overrides(overrides or []):
        _set(tree, key, value)
    return build_config(tree, str(path))


def build_config(tree: dict[str, Any], source: str = "config") -> TrainConfig:
    """Validates a tree of plain values. Raises ConfigError that begins with `source`."""
    try:
        return TypeAdapter(TrainConfig).validate_python(tree)
    except ValidationError as error:
        lines = [_explain(dict(problem)) for problem in error.errors()]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None


def dump_config(config: TrainConfig) -> str:
    """The whole config as YAML, defaults included; load_config reads it back."""
    return yaml.safe_dump(TypeAdapter(TrainConfig).dump_python(config, mode="json"), sort_keys=False)


def parse_overrides(arguments: list[str]) -> list[tuple[str, Any]]:
    """["--train.steps", "5"] or ["--train.steps=5"] -> [("train.steps", 5)]; a value is read as YAML."""
    overrides, rest = [], list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise ConfigError(f"{flag!r}: expected --group.key VALUE, for example --train.steps 5")
        key, equals, text = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"--{key}: needs a value, for example --{key} 5")
            text = rest.pop(0)
        try:
            overrides.append((key, yaml.safe_load(text)))
        except yaml.YAMLError as error:
            raise ConfigError(f"--{key} {text}: the value is not YAML: {error}") from error
    return overrides


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _set(tree: Any, key: str, value: Any) -> None:
    """Sets tree[a][b] for the key "a.b"; a number indexes a list."""
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(tree, dict):
            if tree.get(part) is None:
                tree[part] = {}
            tree = tree[part]
        else:
            tree = tree[_index(tree, part, key)]
    if isinstance(tree, dict):
        tree[last] = value
    else:
        tree[_index(tree, last, key)] = value


def _index(tree: Any, part: str, key: str) -> int:
    if isinstance(tree, list) and part.isdecimal() and int(part) < len(tree):
        return int(part)
    what = f"a list of {len(tree)}: take a number below {len(tree)}" if isinstance(tree, list) else "not a group"
    raise ConfigError(f"--{key}: what {part!r} points into is {what}")


def _explain(problem: dict[str, Any]) -> str:
    """One line for one of pydantic's errors: the dotted key, the value, what is wrong and the nearest key."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "unexpected_keyword_argument":
        known = _fields(_class_at(location[:-1]))
        near = difflib.get_close_matches(location[-1], known, n=1)
        remedy = f"did you mean {near[0]!r}?" if near else f"known keys are {', '.join(known)}"
        return f"unknown key {key!r}; {remedy}"
    if problem["type"] == "missing":
        return f"{key!r} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":  # our own checks name the value themselves
        return f"{key}: {message}" if location else message
    return f"{key} = {problem['input']!r}: {message}"


def _class_at(location: list[str]) -> Any:
    """The dataclass that holds the keys at a location such as ["rewards", "0"]."""
    current: Any = TrainConfig
    for part in location:
        if part.isdecimal():
            continue  # the index of a list, whose element's class is at hand already
        current = typing.get_type_hints(current)[part]
        while typing.get_args(current):  # list[X], X | None
            current = typing.get_args(current)[0]
    return current


def _fields(cls: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]
