"""The config of a run: a tree of dataclasses, read from YAML and dotted overrides, validated by pydantic."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from longgrpo.config.overrides import explain, field_names, parse_overrides, set_key
from longgrpo.errors import ConfigError
from longgrpo.loss.config import GRPOLossConfig
from longgrpo.model.load import ModelConfig
from longgrpo.model.lora import LoraConfig
from longgrpo.rollout.engine import RolloutConfig


@dataclass(frozen=True)
class TaskConfig:
    """The problems. A row of data has a prompt, as text or as messages; its other columns are handed to the rewards."""

    name: str
    """A task of reasoning_gym (chain_sum, say), a .jsonl or .parquet file, a directory that datasets has written, a
    hub id (owner/name), or a function of your own (package.module:function, path/to/file.py:function), which is called
    with `split` and `parameters` and returns a sequence of rows."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Handed to the task, to datasets or to the function. `size` of a reasoning_gym task is the number of different
    problems before they repeat."""
    split: str = "train"
    """The split of a data set."""
    prompt_column: str | None = None
    """The column with the prompt; default prompt, and question for reasoning_gym."""
    seed: int = 0
    """Seed of a reasoning_gym task's training problems, and of the order of other rows."""
    shuffle: bool = True
    """Draw rows in a random order, a new one each epoch. A reasoning_gym task, random by itself, stays in order."""
    sampler: str | None = None
    """A curriculum: path/to/file.py:Class, a longgrpo.tasks.data.Sampler that says which problem comes next."""
    chat: bool | None = None
    """Whether a prompt of plain text is sent as a user's message; default: where the model has a chat template (TRL
    leaves plain text as it is)."""
    chat_template: str | None = None
    """A jinja file in place of the model's own chat template."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template, {enable_thinking: false} for example."""
    system_prompt: str | None = None
    """Begins every conversation that does not bring its own."""
    eval_n: int = 200
    """Number of held-out problems, different from each other and never trained on; 0: no evaluation."""
    eval_name: str | None = None
    """Where held-out problems come from, in the form of `name`; default: from the same source."""
    eval_split: str | None = None
    """Their split of a data set; default: the training problems' own, whose held-out ones training then skips."""
    eval_seed: int = 1_000_000_007
    """Seed of the held-out problems."""
    eval_reward: str | None = None
    """The reward function that says whether a held-out problem is solved (>= 1); default: the first of `rewards`."""
    eval_prefill: str | None = None
    """A control: the untrained model is also evaluated with its reply begun by this template, filled from the columns
    and metadata of a problem, for example "{expression} ="."""

    def __post_init__(self) -> None:
        _require(self.eval_n >= 0, f"eval_n = {self.eval_n}: must be 0 (no evaluation) or more")


@dataclass(frozen=True)
class RewardConfig:
    """One reward function and its weight in the sum; see docs/rewards.md."""

    function: str
    """A built-in (exact_answer, numeric_answer, math_answer, score_answer, graded_error, matches_format, target_length,
    soft_overlong), package.module:function or path/to/file.py:function."""
    weight: float = 1.0
    """0: the function is only logged."""
    name: str | None = None
    """Its name in the logs; default: the function's own."""
    parameters: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the function."""
    timeout: float | None = None
    """Seconds that a call may take. A function that is not async then runs in a process of its own."""
    on_error: Literal["raise", "none"] = "raise"
    """What an exception, a timeout or an unusable value does: stop the run, which can be resumed, or count as "does not
    apply" to the completions of the call."""
    isolate: bool = False
    """Run the function in a process of its own."""

    def __post_init__(self) -> None:
        _require(self.timeout is None or self.timeout > 0, f"timeout = {self.timeout}: must be above 0 seconds")

    @property
    def label(self) -> str:
        return self.name or self.function.rpartition(":")[2]


@dataclass(frozen=True)
class LoopConfig:
    """The loop and its optimizer."""

    steps: int = 50
    """Rollouts, each with its updates."""
    seed: int = 0
    """Seeds the adapter's first weights and every sampled completion."""
    prompts_per_step: int = 8
    """Each with rollout.num_generations completions."""
    learning_rate: float = 1e-5
    """TRL: 1e-6, for full fine-tuning. An adapter wants about ten times as much."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """From the learning rate, after the warm-up, to 0 at the last step (TRL: linear). A constant rate, the usual one in
    reinforcement learning, lets a run be prolonged."""
    warmup_steps: int = 0
    """The learning rate rises to its value over so many steps."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's. TRL: 0.999 for the second, a memory of a thousand steps, longer than most runs."""
    weight_decay: float = 0.0
    """AdamW's."""
    max_grad_norm: float = 1.0
    """A longer gradient is scaled down to this length; .inf: none is."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What a group's centered rewards are divided by: their standard deviation, that of all rewards of the step, or
    nothing (Dr. GRPO, arXiv:2503.20783)."""
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Whether several rewards are summed before they are normalized in their groups or after, and then once more over
    the step (GDPO, arXiv:2601.05242)."""
    max_refills: int = 0
    """Dynamic sampling (DAPO, arXiv:2503.14476): groups without spread are replaced by groups of new prompts, in at
    most so many further rollouts a step."""
    passes: int = 1
    """How often a rollout is trained on (TRL: num_iterations)."""
    minibatches: int = 1
    """Optimizer steps of a pass, each on its part of the groups."""
    mask_truncated: bool = False
    """Leave completions that were cut off at the longest allowed length out of the loss."""
    top_entropy_quantile: float = 1.0
    """Share of tokens, those of the highest entropy in the step, that have a policy gradient (arXiv:2506.01939)."""
    off_policy_threshold: float | None = None
    """A completion with a negative advantage has no policy gradient once the policy has moved so far since the first
    update of its rollout: mean of logp_old - logp over its tokens (DeepSeek-V3.2, arXiv:2512.02556)."""
    reference_sync_steps: int = 0
    """Move the reference of the KL term towards the policy every so many steps; 0: never. Under LoRA the reference
    is the base without its adapter, else, and where it moves, a frozen copy of the trained weights."""
    reference_mixup: float = 0.6
    """reference = mixup * policy + (1 - mixup) * reference."""
    token_budget: int = 4096
    """Tokens of a packed micro-batch, prompts included: it bounds memory and never changes the result."""
    probe_prompts: int = 16
    """Prompts of the self-test before step 1 (docs/selftest.md); 0: none."""
    max_nonfinite: int = 3
    """An update whose gradient is not finite is left out; so many in a row end the run, with a diagnosis."""
    save_steps: int = 25
    """A checkpoint after every so many steps, besides the last; 0: only the last."""
    keep_checkpoints: int = 2
    """The newest that are kept."""
    best_metric: str | None = None
    """The checkpoint of the step with the highest value of this metric is kept as well, for example reward/mean;
    with a minus before its name, the lowest."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "prompts_per_step",
            "passes",
            "minibatches",
            "token_budget",
            "keep_checkpoints",
            "max_nonfinite",
        ):
            _require(getattr(self, name) >= 1, f"{name} = {getattr(self, name)}: must be at least 1")
        for name in (
            "warmup_steps", "probe_prompts", "save_steps", "max_refills", "reference_sync_steps"
        ):  # fmt: skip
            _require(getattr(self, name) >= 0, f"{name} = {getattr(self, name)}: must not be negative")
        _require(self.learning_rate > 0, f"learning_rate = {self.learning_rate}: must be above 0")
        for name in ("top_entropy_quantile", "reference_mixup"):
            _require(0 < getattr(self, name) <= 1, f"{name} = {getattr(self, name)}: must lie in (0, 1]")
        _require(self.max_grad_norm > 0, f"max_grad_norm = {self.max_grad_norm}: must be above 0 (.inf: no clipping)")
        _require(
            self.minibatches <= self.prompts_per_step,
            f"minibatches = {self.minibatches}: a step has only prompts_per_step = {self.prompts_per_step} groups",
        )

    def learning_rate_at(self, step: int) -> float:
        """Of step `step`, from 1."""
        left = 1 - (step - 1 - self.warmup_steps) / max(self.steps - self.warmup_steps, 1)  # of the decay
        decay = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[self.schedule]
        return self.learning_rate * (step / self.warmup_steps if step <= self.warmup_steps else decay)

    @property
    def updates(self) -> int:
        """Optimizer steps of one rollout."""
        return self.passes * self.minibatches


@dataclass(frozen=True)
class MemoryConfig:
    """What is traded for memory in the backward. The gradients stay the same."""

    share_prompts: bool = True
    """Completions of one prompt in a micro-batch share one copy of it (longgrpo.train.packing)."""
    checkpoint: bool = False
    """Keep of each layer its input alone and run it again in the backward."""
    offload: bool = False
    """Checkpoint every layer and keep its input in host memory until the backward wants it (longgrpo.offload)."""
    tiled_mlp: bool = False
    """Run the MLPs and the norms a tile of the sequence at a time (longgrpo.model.tiled_mlp)."""
    tile_rows: int | None = None
    """Tokens of a tile; not set: the hidden size."""

    def __post_init__(self) -> None:
        _require(self.tile_rows is None or self.tile_rows >= 1, f"tile_rows = {self.tile_rows}: must be at least 1")

    @property
    def checkpointed(self) -> bool:
        return self.checkpoint or self.offload


@dataclass(frozen=True)
class LogConfig:
    """What a run tells besides metrics.jsonl."""

    to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=lambda: ["tensorboard"])
    """Trackers. wandb and trackio are to be installed; their own settings (WANDB_MODE, say) are read by them."""
    project: str = "longgrpo"
    """The project of wandb and trackio."""
    completions: int | None = None
    """Completions of each step in completions/, with every reward and the advantage; default: all."""


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
    log: LogConfig = field(default_factory=LogConfig)
    output_dir: str | None = None
    """Where the run lives; default runs/NAME, as the config file is called, numbered if that exists."""

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
            self.model.quantization is None or self.lora is not None,
            f"model.quantization = {self.model.quantization} without lora: packed weights cannot be trained; "
            "add a lora group, or set model.quantization: null",
        )
        names = [reward.label for reward in self.rewards]
        _require(
            len(set(names)) == len(names), f"rewards: a name stands twice in {names}; add up the weights or set `name`"
        )
        _require(
            self.train.reference_sync_steps == 0 or self.loss.beta != 0,
            "train.reference_sync_steps is set and loss.beta is 0: there is no reference; set loss.beta above 0",
        )
        _require(
            self.train.off_policy_threshold is None or not self.loss.exact_kl,
            f"train.off_policy_threshold needs logprobs that loss.kl = {self.loss.kl!r} does without: take kl: k3",
        )
        _require(
            self.train.off_policy_threshold is None or self.train.updates > 1,
            "train.off_policy_threshold compares a rollout's later updates with its first, and train.passes x "
            "train.minibatches = 1: there is none; leave it out",
        )
        _require(
            not (self.loss.exact_kl and self.rollout.request().reshapes),
            f"loss.kl = {self.loss.kl!r} sums over the whole vocabulary, which rollout.sampling cuts: take kl: k3",
        )
        _require(
            (self.train.updates == 1 and self.train.top_entropy_quantile == 1 and not self.loss.exact_kl)
            or self.loss.detach,
            "loss.detach = false is about a rollout without old logprobs: set train.passes and train.minibatches to 1, "
            "train.top_entropy_quantile to 1 and loss.kl to k3",
        )
        _require(
            not (self.loss.exact_kl and self.rollout.request().reshapes),
            f"loss.kl = {self.loss.kl!r} is a sum over the whole vocabulary, and rollout.sampling leaves tokens out: "
            "take kl: k3, or sample without top_p, top_k, min_p, allowed_token_ids and logit_bias",
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
        raise ConfigError(f"{path}: must be a mapping with the keys {', '.join(field_names(TrainConfig))}")
    for key, value in parse_overrides(overrides or []):
        set_key(tree, key, value)
    return build_config(tree, str(path))


def build_config(tree: dict[str, Any], source: str = "config") -> TrainConfig:
    """Validates a tree of plain values. Raises ConfigError that begins with `source`."""
    try:
        return TypeAdapter(TrainConfig).validate_python(tree)
    except ValidationError as error:
        lines = [explain(dict(problem), TrainConfig) for problem in error.errors()]
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None


def dump_config(config: TrainConfig) -> str:
    """The whole config as YAML, defaults included; load_config reads it back."""
    return yaml.safe_dump(config_tree(config), sort_keys=False)


def config_tree(config: TrainConfig) -> dict[str, Any]:
    """The whole config as plain values."""
    return TypeAdapter(TrainConfig).dump_python(config, mode="json")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
