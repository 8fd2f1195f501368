"""The numbers of a step, by name."""

from __future__ import annotations

import difflib
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from longgrpo.config.rollout import RolloutConfig
from longgrpo.errors import ConfigError
from longgrpo.offload import OffloadEngine
from longgrpo.tasks.rewards import Reward
from longgrpo.tasks.sample import Sample
from longgrpo.train.packing import MicroBatch
from longgrpo.train.token_weights import engine_ratio, engine_weight


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


class Agreement:
    """|logprob of the engine - logprob of the trainer| of the sampled tokens, their ratio and what it is cut by."""

    def __init__(self, config: RolloutConfig) -> None:
        self._config = config
        self._total, self._ratio, self._cut, self._count, self.max = 0.0, 0.0, 0, 0, 0.0

    def add(self, batch: MicroBatch, logp: Tensor) -> None:
        """logp [M]: the trainer's."""
        difference = (batch.engine_logp - logp.detach()).abs()
        ratio = engine_ratio(logp.detach(), batch, self._config)
        self._ratio += ratio.sum().item()
        self._cut += int((engine_weight(ratio, self._config) != ratio).sum())
        self._total += difference.sum().item()
        self._count += difference.numel()
        self.max = max(self.max, difference.max().item())

    def metrics(self) -> dict[str, float]:
        count = max(self._count, 1)
        return {
            "engine_trainer_logprob_diff_mean": self._total / count,
            "engine_trainer_logprob_diff_max": self.max,
            "importance_ratio_mean": self._ratio / count,
            "importance_cut": self._cut / count,
        }


class Meter:
    """The metrics of a step's micro-batches as one: sums, the *_min and *_max, and means over the tokens."""

    SUMS = ("policy_loss", "tokens")

    def __init__(self) -> None:
        self._loss, self._tokens = 0.0, 0
        self._values: dict[str, float] = {}

    def add(self, loss: Tensor, metrics: Mapping[str, Tensor], tokens: int) -> None:
        share = tokens / (self._tokens + tokens)
        for name, tensor in metrics.items():
            value = tensor.item()
            old = self._values.get(name, value)
            if name in self.SUMS:
                self._values[name] = self._values.get(name, 0.0) + value
            elif name.endswith("_min"):
                self._values[name] = min(old, value)
            elif name.endswith("_max"):
                self._values[name] = max(old, value)
            else:
                self._values[name] = old + (value - old) * share
        self._loss += loss.item()
        self._tokens += tokens

    def metrics(self) -> dict[str, float]:
        return {"loss": self._loss, **self._values}


def over_updates(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of a step's updates as one: the *_min and *_max, and means."""
    names = dict.fromkeys(name for update in metrics for name in update)
    found = {name: [update[name] for update in metrics if name in update] for name in names}
    return {name: _summary(name)(values) for name, values in found.items()}


def _summary(name: str) -> Callable[[Sequence[float]], float]:
    return min if name.endswith("_min") else max if name.endswith("_max") else fmean


def known(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """None in place of what is not finite, which JSON cannot say."""
    odd = {name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)}
    return {name: None if name in odd else value for name, value in metrics.items()}


def reward_metrics(functions: Sequence[Reward], values: Tensor, totals: Tensor) -> dict[str, float | None]:
    """Mean and deviation of the weighted sum and of each function over the completions to which it applies (None: to
    none). values [F, P, G] f64, totals [P, G] f64."""
    named = {"reward": totals} | {f"reward/{f.name}": value for f, value in zip(functions, values, strict=True)}
    metrics: dict[str, float | None] = {}
    for name, tensor in named.items():
        known = tensor[~tensor.isnan()]
        metrics[f"{name}/mean"] = known.mean().item() if len(known) else None
        metrics[f"{name}/std"] = known.std(correction=0).item() if len(known) else None
    return metrics


def length_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Tokens of a completion, and the share cut off at the longest allowed length."""
    lengths = [len(sample) for sample in samples]
    truncated = [sample.completion.finish_reason == "length" for sample in samples]
    return {
        "completion_length/sum": sum(lengths),
        "completion_length/mean": sum(lengths) / len(lengths),
        "completion_length/min": min(lengths),
        "completion_length/max": max(lengths),
        "completion_length/truncated": sum(truncated) / len(truncated),
    }


def reference_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """The mean of logp - ref_logp over the sampled tokens, by the engine's logp: an unbiased estimate of the reverse KL
    (k1), by which runs compare whatever loss.kl is. Nothing where no reference was scored."""
    ratios = [torch.tensor(s.completion.logprobs) - s.ref_logp.cpu() for s in samples if s.ref_logp is not None]
    return {"reverse_kl": torch.cat(ratios).mean().item()} if ratios else {}


def speed_metrics(
    samples: Sequence[Sample], active: Sequence[Sample], seconds: Mapping[str, float]
) -> dict[str, float]:
    """Completion tokens a second: sampled, and trained on (samples without a gradient are not counted)."""
    return {
        "tokens_per_second/rollout": sum(map(len, samples)) / seconds["roll_out"],
        "tokens_per_second/training": sum(map(len, active)) / (seconds["score"] + seconds["loss_and_backward"]),
    }


def peak_memory() -> dict[str, int]:
    """The most memory that this process has held: in RAM (Linux counts it in KiB) and, with a GPU, on the device."""
    memory = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        memory["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return memory


_OFFLOAD_COUNTS = ("bytes_out", "bytes_in", "keeps", "stall_forward_s", "stall_backward_s")


def offload_counts(engine: OffloadEngine | None) -> dict[str, float]:
    """What the engine has counted so far."""
    return {} if engine is None else {name: engine.stats()[name] for name in _OFFLOAD_COUNTS}


def offload_metrics(engine: OffloadEngine | None, before: dict[str, float]) -> dict[str, float]:
    """What it has counted since, and the host memory that it holds; the stall stands beside the phases' seconds."""
    if engine is None:
        return {}
    since = {name: value - before[name] for name, value in offload_counts(engine).items()}
    stall = since.pop("stall_forward_s") + since.pop("stall_backward_s")
    return {
        **{f"offload/{name}": value for name, value in since.items()},
        "offload/host_peak": engine.stats()["host_peak"],
        "seconds/offload_stall": stall,
    }


def best_metric(name: str | None, metrics: Mapping[str, Any]) -> float | None:
    """The value by which the best checkpoint is chosen: the metric `name`, or "-NAME" for the negative of it; None
    without a name, and where the step has no finite value. Raises ConfigError for a name that no step has."""
    if name is None:
        return None
    key, sign = (name[1:], -1.0) if name.startswith("-") else (name, 1.0)
    if key not in metrics and not key.startswith("eval"):  # an evaluation is not of every step
        near = difflib.get_close_matches(key, metrics, n=3)
        remedy = f"did you mean {' or '.join(near)}?" if near else f"they have {', '.join(metrics)}"
        raise ConfigError(f"train.best_metric = {name!r}: no metric of a step; {remedy}")
    value = metrics.get(key)
    return sign * value if value is not None and math.isfinite(value) else None
