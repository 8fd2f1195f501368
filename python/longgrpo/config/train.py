"""The loop, its optimizer, and what is traded for memory."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any, Literal

from longgrpo.config.check import require
from longgrpo.config.optimizer import OPTIMIZERS, SCHEDULES, decay

ADAPTER_RATE, FULL_RATE = 1e-5, 1e-6
"""Learning rates by default: an adapter needs about ten times as much as all weights."""


@dataclass(frozen=True)
class LoopConfig:
    """The loop and its optimizer."""

    steps: int = 50
    """Number of steps: a rollout and its updates each."""
    seed: int = 0
    """Seed of the adapter's initial weights and of every sampled completion."""
    prompts_per_step: int = 8
    """Prompts per step, each with rollout.num_generations completions."""
    learning_rate: float | None = None
    """The learning rate; default: 1e-5 for an adapter, and 1e-6, TRL's, if all weights are trained."""
    optimizer: str = "adamw"
    """adamw, adamw_fused, sgd, adafactor, muon (torch's; muon steps matrices only, such as an adapter's), adamw_8bit,
    paged_adamw, paged_adamw_8bit (bitsandbytes'), or a class of your own (path/to/file.py:Class)."""
    optim_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer, for example {eps: 1.0e-6} or {momentum: 0.9}."""
    schedule: str = "constant"
    """How the learning rate falls after the warm-up, by transformers' names: constant, linear and cosine (to 0 at the
    last step), cosine_with_restarts, polynomial, inverse_sqrt, cosine_with_min_lr, cosine_warmup_with_min_lr,
    warmup_stable_decay. TRL: linear. With a constant rate, the usual one in reinforcement learning, a run can be
    extended."""
    schedule_args: dict[str, Any] = field(default_factory=dict)
    """Arguments of the schedule, for example {min_lr_rate: 0.1} or {num_decay_steps: 20}."""
    warmup_steps: int = 0
    """Number of steps over which the learning rate rises to its value."""
    betas: tuple[float, float] = (0.9, 0.99)
    """The betas of Adam. TRL: 0.999 for the second, which averages over a thousand steps, longer than most runs."""
    weight_decay: float = 0.0
    """The optimizer's weight decay."""
    max_grad_norm: float = 1.0
    """A gradient with a larger norm is scaled down to this norm; .inf: no clipping."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Divisor of a group's centered rewards. group: their standard deviation; batch: that of all rewards of the step;
    none: no division (Dr. GRPO, arXiv:2503.20783)."""
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Whether several rewards are summed before they are normalized in their groups, or after it. normalize_then_sum
    normalizes the sums once more over the step (GDPO, arXiv:2601.05242)."""
    advantage_level: Literal["episode", "turn"] = "episode"
    """Of a run with tools or an environment. turn: a turn's advantage compares what was earned from it on, its own and
    later turns' values of the functions that return one a turn, with the same turn of the group's other episodes."""
    max_refills: int = 0
    """Dynamic sampling (DAPO, arXiv:2503.14476): groups without spread are replaced by groups of new prompts, in at
    most this many further rollouts per step."""
    num_iterations: int = 1
    """Number of passes over a rollout (mu in the GRPO paper)."""
    minibatches: int = 1
    """Optimizer steps per pass over a rollout, each on its share of the groups."""
    mask_truncated: bool = False
    """Leave completions that reached the length limit unfinished out of the loss."""
    top_entropy_quantile: float = 1.0
    """Share of tokens that have a policy gradient: those with the highest entropy in the step (arXiv:2506.01939)."""
    off_policy_threshold: float | None = None
    """A completion with a negative advantage loses its policy gradient if the policy has moved further than this since
    the first update of its rollout: mean of old_logp - logp over its tokens (DeepSeek-V3.2, arXiv:2512.02556)."""
    reference_sync_steps: int = 0
    """Number of steps after which the reference policy of the KL term moves towards the policy; 0: never. With LoRA a
    fixed reference is the base without its adapter; otherwise the reference is a frozen copy of the trained weights."""
    reference_mixup: float = 0.6
    """reference = mixup * policy + (1 - mixup) * reference."""
    token_budget: int = 4096
    """Tokens of a packed micro-batch, prompts included. It limits memory and never changes the result."""
    probe_prompts: int = 16
    """Prompts of the self-test before step 1 (docs/selftest.md); 0: none."""
    max_skipped_updates: int = 3
    """An update whose gradient is not finite is skipped; this many in a row end the run, with a diagnosis."""
    save_steps: int = 25
    """Number of steps between checkpoints; the last step is always saved. 0: only the last."""
    keep_checkpoints: int = 2
    """Number of the newest checkpoints that are kept."""
    callbacks: list[str] = field(default_factory=list)
    """transformers' TrainerCallbacks: path/to/file.py:Class or package.module:Class, for example
    transformers:EarlyStoppingCallback (docs/callbacks.md)."""
    rank_timeout: float = 1800.0
    """Seconds after which a rank that does not come to where the others are counts as lost, and the run ends
    (docs/ranks.md). It must be longer than a rollout may take on one rank and not on another."""
    best_metric: str | None = None
    """The checkpoint of the step with the highest value of this metric, for example reward/mean, is kept as well; with
    a minus before the name, the lowest value. Default: eval/accuracy if task.eval_steps is set. An evaluation that is
    the best so far is saved at once."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "prompts_per_step",
            "num_iterations",
            "minibatches",
            "token_budget",
            "keep_checkpoints",
            "max_skipped_updates",
        ):
            require(getattr(self, name) >= 1, f"{name} = {getattr(self, name)}: must be at least 1")
        for name in (
            "warmup_steps", "probe_prompts", "save_steps", "max_refills", "reference_sync_steps"
        ):  # fmt: skip
            require(getattr(self, name) >= 0, f"{name} = {getattr(self, name)}: must not be negative")
        require(self.rank_timeout > 0, f"rank_timeout = {self.rank_timeout}: must be above 0 seconds")
        require(self.rate > 0, f"learning_rate = {self.learning_rate}: must be above 0")
        for name in ("top_entropy_quantile", "reference_mixup"):
            require(0 < getattr(self, name) <= 1, f"{name} = {getattr(self, name)}: must lie in (0, 1]")
        require(
            self.off_policy_threshold is None or self.off_policy_threshold >= 0,
            f"off_policy_threshold = {self.off_policy_threshold}: must be 0 nats or more; or leave it out",
        )
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            given: str = getattr(self, name)
            near = difflib.get_close_matches(given, known, n=1) or [", ".join(known)]
            own = name == "optimizer" and ":" in given
            require(given in known or own, f"{name} = {given!r}: there is no such one; is it {near[0]}?")
        require(self.max_grad_norm > 0, f"max_grad_norm = {self.max_grad_norm}: must be above 0 (.inf: no clipping)")
        require(
            self.minibatches <= self.prompts_per_step,
            f"minibatches = {self.minibatches}: a step has only prompts_per_step = {self.prompts_per_step} groups",
        )

    @property
    def rate(self) -> float:
        """The learning rate, which the config of a run has set if nobody else."""
        return ADAPTER_RATE if self.learning_rate is None else self.learning_rate

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step `step`, counted from 1."""
        if step <= self.warmup_steps:  # transformers' own warm-up begins at 0, a step that teaches nothing
            return self.rate * (step / self.warmup_steps)
        arguments = tuple(self.schedule_args.items())
        factor = decay(self.schedule, self.rate, self.warmup_steps, self.steps, arguments)
        return self.rate * factor(step - 1)

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's state for each element that it steps; for a class of one's own those of AdamW."""
        if self.optimizer == "sgd" and not self.optim_args.get("momentum"):
            return 0
        return OPTIMIZERS.get(self.optimizer, OPTIMIZERS["adamw"]).state_bytes

    @property
    def updates(self) -> int:
        """Optimizer steps of one rollout."""
        return self.num_iterations * self.minibatches


@dataclass(frozen=True)
class MemoryConfig:
    """What is traded for memory in the backward. The gradients stay the same."""

    share_prompts: bool = True
    """Completions of one prompt in a micro-batch share one copy of it (longgrpo.train.packing)."""
    checkpoint: bool = False
    """Keep only the input of each layer and recompute the layer in the backward."""
    offload: bool = False
    """Checkpoint every layer and keep its input in host memory until the backward needs it (longgrpo.offload)."""
    inputs_on_device: int = 3
    """Layer inputs that offload leaves on the device: the newest, which the backward needs first, and those on their
    way. With fewer than 3 a layer's forward waits for the copy of one before it, with 1 the backward's first too."""
    tiled_mlp: bool = False
    """Run the MLPs and the norms on one tile of the sequence at a time (longgrpo.model.tiled_mlp)."""
    tile_rows: int | None = None
    """Tokens per tile; default: the hidden size."""
    attention_heads: int | None = None
    """Run attention on so many key-value heads at a time, and recompute it so in the backward
    (longgrpo.model.grouped_attention); default: all at once. Its price is one more forward of attention."""
    shard_gradients: bool = False
    """Full fine-tuning on several ranks: as soon as the backward has a gradient, the rank that owns the parameter gets
    the sum, and the others none. The price is that each micro-batch sends all gradients, not each update."""
    autotune: bool | None = None
    """Measure the head's tiles before step 1, for the whole run (longgrpo.autotune); default: on a GPU."""

    def __post_init__(self) -> None:
        require(self.tile_rows is None or self.tile_rows >= 1, f"tile_rows = {self.tile_rows}: must be at least 1")
        require(
            self.inputs_on_device >= 1, f"inputs_on_device = {self.inputs_on_device}: one is always on its way; set 1"
        )
        heads = self.attention_heads
        require(heads is None or heads >= 1, f"attention_heads = {heads}: must be at least 1")
        require(
            heads is None or self.checkpointed,
            f"attention_heads = {heads} saves memory in a layer that is recomputed: set memory.checkpoint or "
            "memory.offload",
        )

    @property
    def checkpointed(self) -> bool:
        return self.checkpoint or self.offload

    @property
    def depths(self) -> dict[str, Any]:
        """The arguments of OffloadEngine that leave inputs_on_device there."""
        kept = self.inputs_on_device
        return {"inflight": max(1, kept - 1), "keep_last": min(1, kept - 1)}
