"""The cheapest changes of a config that make it fit, in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from longgrpo.memory.cards import GIB
from longgrpo.memory.limits import kv_bytes
from longgrpo.memory.phases import Plan
from longgrpo.memory.shape import ModelShape

if TYPE_CHECKING:
    from longgrpo.config.run import TrainConfig


class Change(NamedTuple):
    text: str
    """The keys and what they are set to."""
    plan: Plan
    """With this change and those before it."""


def cheapest_changes(
    config: TrainConfig, shape: ModelShape, fits: Callable[[Plan], bool], planned: Callable[[TrainConfig], Plan]
) -> list[Change]:
    """Changes, those that cost the least time first, each on top of those before it, until the plan fits or nothing is
    left. A change that lowers no peak is left out. Except for the 4-bit base, none of them changes what is learned."""
    changes: list[Change] = []
    now = planned(config)
    for text, change in _changes(config, shape, now):
        if fits(now):
            break
        changed = change(config)
        plan = planned(changed)
        if _peaks(plan) < _peaks(now):
            config, now = changed, plan
            changes.append(Change(text, plan))
    return changes


def _peaks(plan: Plan) -> tuple[int, int]:
    return plan.device_bytes, sum(phase.device_bytes for phase in plan.phases)


_Edit = Callable[["TrainConfig"], "TrainConfig"]


def _changes(config: TrainConfig, shape: ModelShape, plan: Plan) -> list[tuple[str, _Edit]]:
    """Those that the config does not have yet."""
    rollout, memory = config.rollout, config.memory
    longest = plan.rows.longest
    changes: list[tuple[str, _Edit]] = []

    def offer(wanted: bool, text: str, edit: _Edit) -> None:
        if wanted:
            changes.append((text, edit))

    vllm = rollout.engine != "transformers"
    offer(vllm and not rollout.release_kv_cache, "rollout.release_kv_cache: true", _rollout(release_kv_cache=True))
    offer(
        config.train.token_budget > longest,
        f"train.token_budget: {longest}",
        lambda c: replace(c, train=replace(c.train, token_budget=longest)),
    )
    offer(not memory.checkpointed, "memory.checkpoint: true", _memory(checkpoint=True))
    offer(not memory.tiled_mlp, "memory.tiled_mlp: true", _memory(tiled_mlp=True))
    offer(not memory.offload, "memory.offload: true", _memory(offload=True))
    one = kv_bytes(config, shape, longest) / GIB
    least = -(-one * 100 // 1) / 100 + 0.01
    offer(vllm and rollout.kv_cache_gib > least, f"rollout.kv_cache_gib: {least:.2f}", _rollout(kv_cache_gib=least))
    offer(
        config.lora is not None and config.model.quantization is None,
        "model.quantization: nf4",
        lambda c: replace(c, model=replace(c.model, quantization="nf4")),
    )
    half = -(-one * 50 // 1) / 100 + 0.01
    offer(
        vllm and rollout.kv_cache_dtype == "auto",
        f"rollout.kv_cache_dtype: fp8 and rollout.kv_cache_gib: {half:.2f}",
        _rollout(kv_cache_dtype="fp8", kv_cache_gib=half),
    )
    return changes


def _memory(**fields: bool) -> _Edit:
    return lambda config: replace(config, memory=replace(config.memory, **fields))


def _rollout(**fields: object) -> _Edit:
    return lambda config: replace(config, rollout=replace(config.rollout, **fields))  # type: ignore[arg-type]
