"""The model in training, on the engine's weights, with its optimizer and its reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longgrpo.config.run import TrainConfig
from longgrpo.model.grouped_attention import group_attention
from longgrpo.model.head import head_of
from longgrpo.model.lean_lora import use_lean_lora
from longgrpo.model.lora import add_lora, merge
from longgrpo.model.masters import MasterWeights
from longgrpo.model.packed_attention import use_packed_attention
from longgrpo.model.tiled_mlp import tile_mlp, tile_norms
from longgrpo.offload import OffloadEngine
from longgrpo.rollout.protocol import RolloutEngine
from longgrpo.train.entropy import EntropyControl
from longgrpo.train.optimizer import make_optimizer
from longgrpo.train.ranks import ALONE, Ranks
from longgrpo.train.reference import Reference
from longgrpo.train.shards import GradientShards, owners_of, share_parameters, sum_gradients


@dataclass
class TrainState:
    """What training changes."""

    model: Any  # transformers' model, wrapped by PEFT under LoRA; its base shares the engine's weights
    masters: MasterWeights
    optimizer: torch.optim.Optimizer
    reference: Reference | None  # if the loss has a KL term
    offload: OffloadEngine | None  # holds the layers' inputs between forward and backward
    entropy_control: EntropyControl | None = None  # if loss.entropy_target is set
    skipped_updates: int = 0  # in a row, up to now, because their gradient was not finite
    moved: bool = False  # whether an update of the present step has begun to change the weights
    ranks: Ranks = ALONE
    owners: dict[str, int] = field(default_factory=dict)
    """By parameter the rank that steps it; empty: each rank steps all."""
    trained: dict[str, Tensor] = field(default_factory=dict)
    """The parameters themselves, by name."""
    shards: GradientShards | None = None  # with memory.shard_gradients, if there are owners

    @property
    def parameters(self) -> dict[str, Tensor]:
        """What the optimizer steps, by name, in float32; of what another rank steps the parameter itself."""
        return {**self.trained, **self.masters.parameters} if self.owners else self.masters.parameters

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Of what is stepped here."""
        return {name: p.grad for name, p in self.masters.parameters.items() if p.grad is not None}

    def begin_gradients(self, backwards: int) -> None:
        """Of an update, which has so many backwards on this rank."""
        if self.shards:
            self.shards.begin(backwards)

    def end_backward(self) -> None:
        if self.shards:
            self.shards.end_round()

    def sum_gradients(self) -> Tensor:
        """Adds them up over the ranks; returns the norm of the whole."""
        return sum_gradients(self.masters, self.trained, self.owners, self.ranks, self.shards)

    def publish(self) -> None:
        """Puts what the optimizers have stepped into the model's parameters, on every rank."""
        self.masters.publish()
        share_parameters(self.trained, self.owners, self.ranks)


def make_state(
    config: TrainConfig, engine: RolloutEngine, offload: OffloadEngine | None, ranks: Ranks = ALONE
) -> TrainState:
    """The model in training, on the engine's weights. Full fine-tuning is shared out among the ranks. Raises
    ValueError or NotImplementedError for a config that cannot be trained."""
    model = _trained_model(engine, config, offload)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shared_out = config.lora is None and 1 < ranks.world <= len(trained)
    owners = owners_of(trained, ranks.world) if shared_out else {}
    owned = {name for name, rank in owners.items() if rank == ranks.rank} if owners else None
    shards = GradientShards(trained, owners, ranks) if owners and config.memory.shard_gradients else None
    masters, train = MasterWeights(trained, owned, shards.take if shards else None), config.train
    train.learning_rate_at(1)  # refuses a schedule's arguments now
    optimizer = make_optimizer(masters.parameters.values(), train)
    control = None if config.loss.entropy_target is None else EntropyControl(config.loss.entropy_coef)
    reference = _reference(model, trained, config)
    return TrainState(
        model, masters, optimizer, reference, offload, control, ranks=ranks, owners=owners, trained=dict(trained),
        shards=shards,
    )  # fmt: skip


def _trained_model(engine: RolloutEngine, config: TrainConfig, offload: OffloadEngine | None) -> Any:
    if config.lora:
        if config.lora.merged:
            merge(engine.model, config.lora.merged)
            engine.weights_changed()
        model: Any = add_lora(engine.model, config.lora, config.train.seed)
    else:
        model = engine.model.requires_grad_(True)
    use_packed_attention(model)
    if config.lora:
        use_lean_lora(model)
    if engine.shared:
        engine.shared.use_in(model)
    if config.memory.tiled_mlp:
        tile_norms(tile_mlp(model, config.memory.tile_rows), config.memory.tile_rows)
    if config.memory.attention_heads:
        group_attention(model, config.memory.attention_heads, config.memory.tile_rows)
    if offload:
        offload.install(model)
    elif config.memory.checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train(config.memory.checkpointed)  # transformers checkpoints in training mode only; there is no dropout
    engine.attach(model)
    return model


def _reference(model: Any, parameters: dict[str, Tensor], config: TrainConfig) -> Reference | None:
    if config.loss.beta == 0:
        return None
    bias = head_of(model).options["bias"]
    if config.loss.exact_kl and bias is not None and bias.requires_grad:
        raise ValueError(
            f"loss.kl = {config.loss.kl!r} with a trained bias of the head, which the reference would share: "
            "add a lora group, or take kl: k3"
        )
    own = config.lora is None or config.lora.path is not None  # else it is the base, without its adapter
    return Reference(model, parameters, copy=own or config.train.reference_sync_steps > 0)
