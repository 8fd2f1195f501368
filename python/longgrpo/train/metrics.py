"""The numbers of a step, by name."""

from __future__ import annotations

import difflib
import math
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from longgrpo.errors import ConfigError
from longgrpo.offload import OffloadEngine
from longgrpo.tasks.episodes import FAILURES
from longgrpo.tasks.rewards import Reward
from longgrpo.tasks.sample import Rollout, Sample
from longgrpo.train.ranks import ALONE, Ranks


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


# The loss's metrics under the names that a run has for them.
_NAMES = {
    "sampling_diff_mean": "engine_trainer_logprob_diff_mean",
    "sampling_diff_max": "engine_trainer_logprob_diff_max",
    "sampling_ratio_mean": "importance_ratio_mean",
    "sampling_cut": "importance_cut",
}


class Meter:
    """The metrics of an update's micro-batches as one: sums, the *_min and *_max, and means over the tokens. They stay
    on the device until `read`, the one time that an update waits for it."""

    SUMS = ("loss", "policy_loss", "tokens")

    def __init__(self) -> None:
        self._names: list[str] = []
        self._rows: list[Tensor] = []  # [K] float32, one a micro-batch
        self._tokens: list[int] = []

    def add(self, metrics: Mapping[str, Tensor], tokens: int) -> None:
        """Scalar tensors of a micro-batch with this number of tokens."""
        self._names = [_NAMES.get(name, name) for name in metrics]
        self._rows.append(torch.stack([value.detach().float().view(()) for value in metrics.values()]))
        self._tokens.append(tokens)

    def read(self, norm: Tensor, ranks: Ranks = ALONE) -> tuple[float, dict[str, float]]:
        """`norm`, a scalar, and the metrics of all ranks: one copy from the device."""
        if self._rows:  # without a gradient the norm is torch's own 0, on the host
            norm = norm.to(self._rows[0].device, non_blocking=True)
        first, *values = torch.cat([norm.float().view(1), *self._rows]).cpu().tolist()
        found: dict[str, float] = {}
        seen = 0
        for names, counts, numbers in ranks.gather((self._names, self._tokens, values), "the loss"):
            remaining = iter(numbers)
            for tokens in counts:
                seen += tokens
                for name in names:
                    found[name] = self._joined(name, found.get(name), next(remaining), tokens / seen)
        return first, found

    def _joined(self, name: str, old: float | None, value: float, share: float) -> float:
        if old is None:
            return value
        if name in self.SUMS:
            return old + value
        if name.endswith(("_min", "_max")):
            return _summary(name)([old, value])
        return old + (value - old) * share


def over_updates(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The metrics of a step's updates as one: the *_min and *_max, and means."""
    names = dict.fromkeys(name for update in metrics for name in update)
    found = {name: [update[name] for update in metrics if name in update] for name in names}
    return {name: _summary(name)(values) for name, values in found.items()}


def _summary(name: str) -> Callable[[Sequence[float]], float]:
    return min if name.endswith("_min") else max if name.endswith("_max") else fmean


def known(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """None in place of values that are not finite, which JSON cannot hold."""
    odd = {name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)}
    return {name: None if name in odd else value for name, value in metrics.items()}


def reward_metrics(functions: Sequence[Reward], values: Tensor, totals: Tensor) -> dict[str, float | None]:
    """Mean, deviation and range of the weighted sum and of each function over the completions to which it applies
    (None: to none), and of several functions each one's correlation with the sum. values [F, P, G] f64, totals [P, G]
    f64."""
    named = {"reward": totals} | {f"reward/{f.name}": value for f, value in zip(functions, values, strict=True)}
    metrics: dict[str, float | None] = {}
    for name, tensor in named.items():
        known = tensor[~tensor.isnan()]
        metrics[f"{name}/mean"] = known.mean().item() if len(known) else None
        metrics[f"{name}/std"] = known.std(correction=0).item() if len(known) else None
        metrics[f"{name}/min"] = known.min().item() if len(known) else None
        metrics[f"{name}/max"] = known.max().item() if len(known) else None
        if name != "reward" and len(functions) > 1:
            metrics[f"{name}/correlation"] = _correlation(tensor, totals)
    return metrics


def _correlation(values: Tensor, totals: Tensor) -> float | None:
    """Pearson's, over the completions that have both; None if either is constant."""
    both = ~(values.isnan() | totals.isnan())
    pair = torch.stack([values[both], totals[both]])  # [2, N]
    if pair.shape[1] == 0 or (pair.amax(1) == pair.amin(1)).any():
        return None
    return torch.corrcoef(pair)[0, 1].item()


def length_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Tokens of a completion, and the share truncated at the length limit."""
    lengths = [len(sample) for sample in samples]
    truncated = [sample.completion.finish_reason == "length" for sample in samples]
    return {
        "completion_length/sum": sum(lengths),
        "completion_length/mean": sum(lengths) / len(lengths),
        "completion_length/min": min(lengths),
        "completion_length/max": max(lengths),
        "completion_length/truncated": sum(truncated) / len(truncated),
    }


def turn_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Of a run with tools or an environment: turns of an episode, tokens given to it, the share of what later turns go
    on from that was in the engine's cache, and calls, with their seconds and failures in all. Else nothing."""
    pairs = [(sample, sample.episode) for sample in samples if sample.episode]
    if not pairs:
        return {}
    turns = [len(sample.completion.turns) for sample, _ in pairs]
    later = [(sample, turn) for sample, _ in pairs for turn in sample.completion.turns[1:]]
    before = sum(len(sample.prompt_ids) + turn.begin for sample, turn in later)
    answered = [one for _, episode in pairs for one in episode.answered]
    return {
        "turns/mean": fmean(turns),
        "turns/max": max(turns),
        "turns/given_tokens": fmean(len(sample.completion.token_ids) - len(sample) for sample, _ in pairs),
        **({"turns/prefix_reuse": sum(turn.cached for _, turn in later) / before} if later else {}),
        "calls/mean": len(answered) / len(pairs),
        "calls/seconds": sum(one.seconds for one in answered),
        **{f"calls/{kind}": sum(one.failure == kind for one in answered) for kind in FAILURES},
        "calls/failed_episodes": sum(bool(episode.failed) for _, episode in pairs),
    }


def variety_metrics(rollout: Rollout) -> dict[str, float]:
    """How alike the completions are, by their tokens. alike: of a group, the share that is its most frequent
    completion. repetition: the share of 4-grams that stood earlier in the same completion (seq-rep-4,
    arXiv:1908.04319)."""
    groups: dict[int, Counter[tuple[int, ...]]] = {}
    for sample in rollout.samples:
        groups.setdefault(sample.group, Counter())[tuple(sample.completion.sampled_ids)] += 1
    return {
        "completions/alike": fmean(max(seen.values()) / seen.total() for seen in groups.values()),
        "completions/repetition": _repetition(rollout.token_ids, rollout.bounds),
    }


_FACTOR = 6364136223846793005  # Knuth's, of a generator modulo 2^64: two n-grams get one number in 1 of 2^64 cases


def _repetition(token_ids: Tensor, bounds: Sequence[int], n: int = 4) -> float:
    """token_ids [T] int64; sample i has those at [bounds[i], bounds[i+1]). 0 if no sample has n tokens."""
    lengths = torch.tensor(bounds).diff()
    sample = torch.arange(len(lengths)).repeat_interleave(lengths)  # [T]
    starts = (torch.arange(len(token_ids)) + n <= torch.tensor(bounds[1:])[sample]).nonzero().flatten()
    if len(starts) == 0:
        return 0.0
    grams = sample[starts]
    for i in range(n):
        grams = grams * _FACTOR + token_ids[starts + i]
    return 1 - len(grams.unique()) / len(grams)


def sign_metrics(advantages: Sequence[float]) -> dict[str, float]:
    """The share of positive ones among the advantages of an update that are not 0; nothing if all are."""
    signed = [value > 0 for value in advantages if value != 0]
    return {"advantages/positive": sum(signed) / len(signed)} if signed else {}


def step_metrics(rollout: Rollout, trained: int, measured: Mapping[str, float]) -> dict[str, float]:
    """Lengths, speed, time and memory of a step. trained: completion tokens that it trained on. measured: by
    rank_metrics, over all ranks."""
    training = measured["seconds/score"] + measured["seconds/loss_and_backward"]
    return {
        **length_metrics(rollout.samples),
        **turn_metrics(rollout.samples),
        **variety_metrics(rollout),
        "tokens_per_second/rollout": rollout.bounds[-1] / measured["seconds/roll_out"],
        "tokens_per_second/training": trained / training,
        **measured,
    }


def rank_metrics(
    synced: Mapping[str, float], seconds: Mapping[str, float], offload: OffloadEngine | None,
    offloaded: Mapping[str, float],
) -> dict[str, float]:  # fmt: skip
    """What a rank has measured in a step. synced: by its engine; offloaded: what offload_counts returned before it."""
    return {
        **synced,
        **{f"seconds/{name}": value for name, value in seconds.items()},
        **offload_metrics(offload, offloaded),
        **peak_memory(),
    }


def over_ranks(measured: Sequence[Mapping[str, float]], collectives: Sequence[float]) -> dict[str, float]:
    """The ranks' measurements as one: a phase lasts as long as on the slowest rank, peaks are the highest, and what was
    moved is added up. collectives: seconds of each rank in them. The rank that comes last waits for none: its are what
    they cost, and those of the one that comes first are longer by what the ranks differ."""
    if len(measured) == 1:
        return dict(measured[0])
    found = {
        name: (sum if name in _ADDED else max)(own[name] for own in measured if name in own)
        for name in dict.fromkeys(name for own in measured for name in own)
    }
    skew = max(collectives) - min(collectives)
    return {**found, "seconds/collectives": min(collectives), "seconds/rank_skew": skew}


_ADDED = ("weight_sync_bytes", "offload/bytes_out", "offload/bytes_in", "offload/keeps")


def peak_memory() -> dict[str, int]:
    """The most memory that this process has held: in RAM (Linux counts it in KiB) and, with a GPU, on the device."""
    memory = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_available():
        memory["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return memory


_OFFLOAD_COUNTS = ("bytes_out", "bytes_in", "keeps", "stall_forward_s", "stall_backward_s")


def offload_counts(engine: OffloadEngine | None) -> dict[str, float]:
    """The engine's counts so far."""
    return {} if engine is None else {name: engine.stats()[name] for name in _OFFLOAD_COUNTS}


def offload_metrics(engine: OffloadEngine | None, before: Mapping[str, float]) -> dict[str, float]:
    """What it has counted since, and the host memory that it holds; the stall joins the phases' seconds."""
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
    without a name, and if the step has no finite value. Raises ConfigError for a name that no step has."""
    if name is None:
        return None
    key, sign = (name[1:], -1.0) if name.startswith("-") else (name, 1.0)
    evaluated = any(metric.startswith("eval/") for metric in metrics)
    if key not in metrics and (evaluated or not key.startswith("eval/")):  # an evaluation is not of every step
        near = difflib.get_close_matches(key, metrics, n=3)
        remedy = f"did you mean {' or '.join(near)}?" if near else f"they have {', '.join(metrics)}"
        raise ConfigError(f"train.best_metric = {name!r}: not a metric of a step; {remedy}")
    value = metrics.get(key)
    return sign * value if value is not None and math.isfinite(value) else None
