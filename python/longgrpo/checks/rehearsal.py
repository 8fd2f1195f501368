"""The longest micro-batch that a config permits: planned for, and rehearsed before the first step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from longgrpo._ops.offload import host_budget
from longgrpo.checks.counted import NOT_TRAINERS, counted_plan, dry_run, longest_rollout, rows_of
from longgrpo.config.check import require
from longgrpo.config.run import TrainConfig
from longgrpo.errors import ConfigError
from longgrpo.memory.cards import GIB, card
from longgrpo.memory.internal import CPU, Internal, Target
from longgrpo.memory.ladder import Change, cheapest_changes
from longgrpo.memory.live import LiveStorages
from longgrpo.memory.phases import Phase, Plan
from longgrpo.memory.plan import Formulas, plan_memory
from longgrpo.memory.ranks import BANDWIDTH, ONE, Layout, sent
from longgrpo.memory.shape import UnknownArchitecture, model_shape
from longgrpo.model.lora import with_adapter
from longgrpo.rollout.protocol import RolloutEngine
from longgrpo.train.loop import Loop, loss_and_backward, score
from longgrpo.train.update import plan_updates

log = logging.getLogger(__name__)


class Forecast:
    """What a rank will need on a card, or without one on this machine: `--card`'s name or GiB; None: what is here.

    Raises ConfigError for a config that contradicts itself, an unknown architecture or card.
    """

    def __init__(
        self,
        config: TrainConfig,
        card_name: str | None = None,
        prompt_length: int | None = None,
        layout: Layout = ONE,
        bandwidth: float = BANDWIDTH,
    ) -> None:
        """layout: of the ranks, which the plan of an architecture without formulas does not look at; bandwidth: of
        each to the others, in GB/s."""
        self.layout, self.bandwidth = layout, bandwidth
        try:
            require(
                config.train.prompts_per_step >= layout.ranks,
                f"train.prompts_per_step = {config.train.prompts_per_step}, and there are {layout.ranks} ranks: each "
                "needs a prompt; raise it, or take fewer ranks",
            )
            require(bandwidth > 0, f"--bandwidth {bandwidth:g}: must be above 0 GB/s")
            self.capacity, self.target = _capacity(card_name)
            self.config, self.prompt_length = with_adapter(config), prompt_length
            self.shape = model_shape(config.model.path)
            self.rollout = longest_rollout(config, self.shape.context, prompt_length)
            self.plan = self._planned(self.config)
        except (ValueError, FileNotFoundError) as error:
            raise ConfigError(str(error)) from error

    def _planned(self, config: TrainConfig) -> Plan:
        rollout = longest_rollout(config, self.shape.context, self.prompt_length)
        rows = rows_of(config, rollout)
        if not self.shape.has_formulas:
            return counted_plan(config, self.shape, rollout, rows, self.target)
        return plan_memory(config, self.shape, rows, self.target, self.layout.ranks)

    def exchange(self) -> dict[str, float]:
        """Of several ranks: the host memory that those of a machine need together, what each sends for an update, and
        the seconds that this takes at the bandwidth."""
        if self.layout.ranks == 1 or not self.shape.has_formulas:
            return {}
        trained = Formulas(self.config, self.shape, self.plan.rows, self.target).trained
        element = getattr(torch, self.config.model.dtype).itemsize
        size = sent(self.config, element, trained, self.layout.ranks, self._backwards())
        return {
            "machine_host_bytes": self.layout.each * self.plan.host_bytes,
            "sent_bytes": size,
            "sent_seconds": size / (1e9 * self.bandwidth),
        }

    def _backwards(self) -> int:
        """Micro-batches of an update on a rank, all as long as the longest."""
        train, ranks = self.config.train, self.layout.ranks
        samples = -(-train.prompts_per_step // ranks) * self.config.rollout.num_generations
        return max(1, -(-samples // (len(self.rollout.samples) * train.minibatches)))

    def needs(self, plan: Plan) -> int:
        """Bytes that must fit: without a GPU device and host are one memory."""
        return plan.device_bytes + (0 if self.target.is_cuda else plan.host_bytes)

    def fits(self, plan: Plan | None = None) -> bool:
        return self.needs(plan or self.plan) <= self.capacity

    def changes(self) -> list[Change]:
        return cheapest_changes(self.config, self.shape, self.fits, self._planned)

    def text(self) -> str:
        rows = self.plan.rows
        how = "predicted" if self.shape.has_formulas else "counted on meta tensors"
        lines = [
            f"memory, {how}: the longest micro-batch has {rows.tokens} tokens ({rows.attention} in attention, "
            f"{rows.loss} in the loss)"
        ]
        for phase in self.plan.phases:
            host = f", host {phase.host_bytes / GIB:.2f} GiB" if phase.host_bytes else ""
            lines.append(f"  {phase.name:9}{phase.device_bytes / GIB:8.2f} GiB{host}")
            terms = (phase.terms | {f"{name} (host)": size for name, size in phase.host_terms.items()}).items()
            lines += [f"    {size / GIB:8.2f}  {name}" for name, size in terms if size >= GIB / 200]
        if exchange := self.exchange():
            lines.append(
                f"  each of {self.layout.ranks} ranks; host memory of a machine's {self.layout.each}: "
                f"{exchange['machine_host_bytes'] / GIB:.2f} GiB; an update sends {exchange['sent_bytes'] / GIB:.2f} "
                f"GiB a rank, {exchange['sent_seconds']:.2g} s at {self.bandwidth:g} GB/s"
            )
        lines.append(self._verdict())
        if not self.fits():
            changes = self.changes()
            lines += [f"  {self.needs(change.plan) / GIB:8.2f} GiB with {change.text}" for change in changes]
            if not changes or not self.fits(changes[-1].plan):
                lines.append("  no change of the config is enough: use a larger card, fewer tokens or a smaller model")
        return "\n".join(lines)

    def short(self) -> str:
        """Two lines: the phases' peaks, and whether they fit."""
        phases = ", ".join(f"{phase.name} {phase.device_bytes / GIB:.2f}" for phase in self.plan.phases)
        return f"memory by longgrpo plan: {phases} GiB\n{self._verdict()}"

    def _verdict(self) -> str:
        need, has = self.needs(self.plan) / GIB, self.capacity / GIB
        rest = "" if self.target.is_cuda else ", without Python and its libraries (1 GiB)"
        return f"{'fits' if self.fits() else 'does not fit'}: {need:.2f} of {has:.2f} GiB{rest}"

    def json(self) -> dict[str, Any]:
        return {
            "fits": self.fits(),
            "capacity_bytes": self.capacity,
            "rows": self.plan.rows._asdict(),
            **{phase.name: as_json(phase) for phase in self.plan.phases},
            **({"ranks": {"ranks": self.layout.ranks, **exchange}} if (exchange := self.exchange()) else {}),
            "changes": [
                {"change": change.text, "needs_bytes": self.needs(change.plan), "fits": self.fits(change.plan)}
                for change in ([] if self.fits() else self.changes())
            ],
        }

    def dry_run(self) -> dict[str, Phase]:
        return dry_run(self.config, self.rollout, self.target)

    def rehearse(self, loop: Loop) -> dict[str, tuple[int, int]]:
        """Reads a step's prompts at their longest, scores the longest micro-batch and makes its gradient: what does not
        fit fails now and not at step 120. No weight changes. Returns each phase's peak in bytes, predicted and
        measured; none of the rollout if the engine has no cache of its own, which grows with what it samples."""
        state, engine = loop.state, loop.collector.engine
        (update,) = plan_updates(loop.config, self.rollout, state.model.device, parts=1)
        phases: dict[str, Callable[[], Any]] = {
            "scoring": lambda: score(loop.config, state, [update]),
            "training": lambda: loss_and_backward(loop.loss, state, update),
        }
        cache = engine.cache_bytes
        if cache:
            phases = {"rollout": lambda: self._read_prompts(engine), **phases}
        apart = ("context", "optimizer") if cache else (*NOT_TRAINERS, "optimizer")  # there is no state yet
        peaks = {}
        for name, run in phases.items():
            released = name != "rollout" and self.config.rollout.release_kv_cache
            measured = _peak_of(run, loop, self.target, 0 if released else cache)
            phase: Phase = getattr(self.plan, name)
            peaks[name] = phase.device_bytes - sum(phase.terms.get(term, 0) for term in apart), measured
        state.optimizer.zero_grad(set_to_none=True)
        return peaks

    def _read_prompts(self, engine: RolloutEngine) -> None:
        """The rollout of a step, a token each: the cache has its size from the start. No group shares a prefix."""
        train, group = self.config.train, self.config.rollout.num_generations
        length = len(self.rollout.samples[0].prompt_ids)
        own = -(-train.prompts_per_step // self.layout.ranks)
        prompts = [[i, *[0] * (length - 1)] for i in range(own) for _ in range(group)]
        sampling = replace(self.config.rollout.request(), max_tokens=1, others={})
        engine.generate(prompts, sampling, range(len(prompts)))
        engine.drop_caches()


def forecast_run(config: TrainConfig, prompt_length: int, force: bool, layout: Layout = ONE) -> Forecast | None:
    """Logs what a run here will need. Raises ConfigError, with the remedies, if that does not fit, unless `force`.
    None for a model that is neither computed nor counted."""
    try:
        forecast = Forecast(config, prompt_length=prompt_length, layout=layout)
    except ConfigError as error:
        if not isinstance(error.__cause__, UnknownArchitecture):
            raise
        log.info("no memory plan: %s", error)
        return None
    if not (forecast.fits() or force):
        raise ConfigError(f"{forecast.text()}\n--force trains all the same")
    log.info("%s", forecast.short())
    return forecast


def as_json(phase: Phase) -> dict[str, Any]:
    return {
        "device_bytes": phase.device_bytes,
        "host_bytes": phase.host_bytes,
        "terms": phase.terms | {f"{name} (host)": size for name, size in phase.host_terms.items()},
    }


def _capacity(card_name: str | None) -> tuple[int, Target]:
    if card_name is not None:
        found = card(card_name)
        return found.memory, Target(found.multiprocessors)
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free, Target(torch.cuda.get_device_properties().multi_processor_count)
    return host_budget(), CPU


def _peak_of(run: Callable[[], Any], loop: Loop, target: Target, cache: int) -> int:
    """Bytes: by torch's allocator on a GPU, else in live storages and the `cache` bytes of the engine."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        run()
        # vLLM unmaps the pages of a cache that it gives back; to the allocator they stay its own.
        peak = int(torch.cuda.max_memory_allocated())
        return peak - (loop.collector.engine.cache_bytes - cache)
    live = LiveStorages(Internal(target))
    with live:
        live.add([*loop.state.model.parameters(), *loop.state.model.buffers()], "weights")
        live.add(loop.state.parameters.values(), "masters")
        live.hold(cache, "KV cache")
        live.reset_peak()  # a phase may have nothing to do
        run()
    return live.peak
