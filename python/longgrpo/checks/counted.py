"""A step of the longest micro-batch that a config permits, counted in live storages, on `meta` or on real tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from longgrpo.config.optimizer import OPTIMIZERS
from longgrpo.config.run import TrainConfig
from longgrpo.errors import ConfigError
from longgrpo.memory.dryrun import MetaEngine
from longgrpo.memory.internal import Internal, Target
from longgrpo.memory.limits import check
from longgrpo.memory.live import LiveStorages
from longgrpo.memory.phases import Phase, Plan, Rows
from longgrpo.memory.plan import Formulas
from longgrpo.memory.shape import ModelShape, UnknownArchitecture, config_file
from longgrpo.offload import OffloadEngine
from longgrpo.rollout.protocol import Completion
from longgrpo.tasks.sample import Rollout, Sample
from longgrpo.train.loop import loss_and_backward, optimizer_step, score
from longgrpo.train.losses import PolicyLoss
from longgrpo.train.packing import pack, split
from longgrpo.train.state import TrainState, make_state
from longgrpo.train.update import plan_updates

NOT_TRAINERS = ("context", "KV cache")
"""Terms that the trainer itself does not hold."""


def longest_rollout(config: TrainConfig, context: int, prompt_length: int | None = None) -> Rollout:
    """The samples of the longest micro-batch: prompts of `prompt_length` tokens, completions as long as they may be.

    Without a prompt length prompts fill what rollout.max_model_len leaves, or else train.token_budget.
    """
    rollout, train = config.rollout, config.train
    longest = rollout.max_model_len or min(context, max(train.token_budget, rollout.max_completion_length + 1))
    prompt = max(1, min(prompt_length or longest, longest - rollout.max_completion_length))
    length = min(rollout.max_completion_length, longest - prompt)
    completion = Completion([0] * length, [0.0] * length, "stop")
    samples = [
        Sample(group, [0] * prompt, completion, "")
        for group in range(train.prompts_per_step)
        for _ in range(rollout.num_generations)
    ]
    return _rollout(next(split(samples, train.token_budget, config.memory.share_prompts)))


def _rollout(samples: Sequence[Sample]) -> Rollout:
    """Samples that all have a gradient, as one group."""
    rollout = Rollout.of([], samples, torch.zeros(0, 1, len(samples)))
    return replace(rollout, advantages=torch.ones_like(rollout.advantages))


def rows_of(config: TrainConfig, rollout: Rollout) -> Rows:
    batch = pack(rollout, range(len(rollout.samples)), share_prompts=config.memory.share_prompts)
    lengths = batch.packed.lengths
    return Rows(len(batch.packed.input_ids), sum(lengths), len(batch.target), max(lengths) + 1)


def dry_run(config: TrainConfig, rollout: Rollout, target: Target) -> dict[str, Phase]:
    """count_step on storages that are not there, with the attention of a GPU."""
    dtype = getattr(torch, config.model.dtype)
    memory = config.memory
    offload = OffloadEngine(backend="count", host_bytes=1 << 44, **memory.depths) if memory.offload else None
    engine: Any = MetaEngine(config_file(config.model.path).parent, dtype, config.model.quantization)
    name = config.train.optimizer
    if name in OPTIMIZERS and OPTIMIZERS[name].module != "torch.optim":
        raise ConfigError(f"train.optimizer = {name!r} does not step without storage: drop --dry-run, or take adamw")
    state = make_state(config, engine, offload)
    for group in state.optimizer.param_groups:
        if "foreach" in group and not group.get("fused"):
            group["foreach"] = target.is_cuda  # as torch chooses there
    return count_step(config, state, rollout, target)


def count_step(config: TrainConfig, state: TrainState, rollout: Rollout, target: Target) -> dict[str, Phase]:
    """Phases 5 to 7 of a step, the trainer's own: the peaks of scoring and training in live storages, and what stays
    between steps as "rest".

    It is the second step, as the optimizer's state is there, and has the micro-batch twice, as gradients are there when
    the second one runs. What the trainer holds is counted: no key-value cache and no CUDA context.
    """
    loss, device = PolicyLoss(config), state.model.device
    groups = config.train.prompts_per_step
    again = [replace(sample, group=sample.group + groups) for sample in rollout.samples]
    (once,) = plan_updates(config, rollout, device, parts=1)
    (twice,) = plan_updates(config, _rollout([*rollout.samples, *again]), device, parts=1)
    with LiveStorages(Internal(target)) as live:
        live.add(state.parameters.values(), "trained")
        live.add([*state.model.parameters(), *state.model.buffers()], "weights")
        live.add(state.reference.tensors.values() if state.reference else [], "reference")
        score(config, state, [once, twice])
        norm = loss_and_backward(loss, state, once)[0]
        live.label = "optimizer"  # what is left of its first step is its state
        optimizer_step(config, state, 1, once, norm)
        live.label = "activations"
        rest = Phase("rest", dict(live.by_label))
        live.reset_peak()
        score(config, state, [once])
        scoring = Phase("scoring", dict(live.at_peak))
        live.reset_peak()
        optimizer_step(config, state, 2, twice, loss_and_backward(loss, state, twice)[0])
    host = {"layer inputs": int(state.offload.stats()["host_peak"])} if state.offload else {}
    return {"rest": rest, "scoring": scoring, "training": Phase("training", dict(live.at_peak), host)}


def counted_plan(config: TrainConfig, shape: ModelShape, rollout: Rollout, rows: Rows, target: Target) -> Plan:
    """The plan of a model that there are no formulas for: what a dry run counts, and the engine beside it.

    Raises ValueError as plan_memory does, and UnknownArchitecture if the model does not run on `meta`.
    """
    check(config, shape, rows)
    adamw = replace(config, train=replace(config.train, optimizer="adamw", optim_args={}))
    try:
        counted = dry_run(adamw, rollout, target)
    except Exception as error:  # a foreign model's own code may raise anything
        raise UnknownArchitecture(
            f"{config.model.path}: the planner has no formulas for the architecture {shape.kind!r}, and a step on meta "
            f"tensors fails: {error}"
        ) from error
    model = _Counted(config, shape, rows, target, counted)
    return Plan(model.rollout(), model.scoring(), model.training(), rows)


class _Counted(Formulas):
    """The rollout's formulas on top of what was counted."""

    def __init__(
        self, config: TrainConfig, shape: ModelShape, rows: Rows, target: Target, counted: dict[str, Phase]
    ) -> None:
        super().__init__(config, shape, rows, target)
        self.counted = counted

    @property
    def trained(self) -> int:
        return self.counted["rest"].terms["trained"] // 4  # float32

    def _with_engine(self, phase: Phase) -> dict[str, int]:
        state = {"optimizer": self.config.train.state_bytes * self.trained}  # of the run's own optimizer
        return phase.terms | state | self.beside_the_trainer()

    def resident(self) -> dict[str, int]:
        return self._with_engine(self.counted["rest"])

    def scoring(self) -> Phase:
        return Phase("scoring", self._with_engine(self.counted["scoring"]) | self.cache)

    def training(self) -> Phase:
        training = self.counted["training"]
        return Phase("training", self._with_engine(training) | self.cache, training.host_terms)
