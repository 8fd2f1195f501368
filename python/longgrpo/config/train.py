"""The loop, its optimizer, and what is traded for memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from longgrpo.config.check import require


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
            require(getattr(self, name) >= 1, f"{name} = {getattr(self, name)}: must be at least 1")
        for name in (
            "warmup_steps", "probe_prompts", "save_steps", "max_refills", "reference_sync_steps"
        ):  # fmt: skip
            require(getattr(self, name) >= 0, f"{name} = {getattr(self, name)}: must not be negative")
        require(self.learning_rate > 0, f"learning_rate = {self.learning_rate}: must be above 0")
        for name in ("top_entropy_quantile", "reference_mixup"):
            require(0 < getattr(self, name) <= 1, f"{name} = {getattr(self, name)}: must lie in (0, 1]")
        require(self.max_grad_norm > 0, f"max_grad_norm = {self.max_grad_norm}: must be above 0 (.inf: no clipping)")
        require(
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
        require(self.tile_rows is None or self.tile_rows >= 1, f"tile_rows = {self.tile_rows}: must be at least 1")

    @property
    def checkpointed(self) -> bool:
        return self.checkpoint or self.offload
