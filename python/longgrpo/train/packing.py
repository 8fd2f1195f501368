"""Samples laid end to end: micro-batches within a token budget, and only the rows that the loss needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from longgrpo.model.packed_attention import PackedBatch
from longgrpo.rollout.engine import Completion


@dataclass
class Sample:
    """A completion on its way through a step."""

    group: int
    """The prompt's number within the step: samples of one group have one prompt."""
    prompt_ids: list[int]
    completion: Completion
    text: str
    advantage: float = 0.0
    rewards: dict[str, float] = field(default_factory=dict)
    ref_logp: Tensor | None = None  # [T] f32

    def __len__(self) -> int:
        """Tokens of the completion."""
        return len(self.completion.token_ids)


@dataclass(frozen=True)
class MicroBatch:
    """S samples in one packed row, M completion tokens in all, sample after sample."""

    samples: list[Sample]
    packed: PackedBatch
    rows: Tensor  # [M] int64: packed.input_ids[rows[i]] is the token before target[i]
    target: Tensor  # [M] int64: the completion tokens
    cu_seqlens: Tensor  # [S+1] int32: sample s has target[cu_seqlens[s]:cu_seqlens[s+1]]


def micro_batches(samples: Sequence[Sample], token_budget: int, device: torch.device | str = "cpu") -> list[MicroBatch]:
    """Packs `samples` in their order. A micro-batch exceeds the budget only where one sample alone does."""
    return [pack(part, device) for part in _split(samples, token_budget)]


def _split(samples: Sequence[Sample], token_budget: int) -> Iterator[list[Sample]]:
    part: list[Sample] = []
    used = 0
    for sample in samples:
        cost = len(sample.prompt_ids) + len(sample)
        if part and used + cost > token_budget:
            yield part
            part, used = [], 0
        part.append(sample)
        used += cost
    if part:
        yield part


def pack(samples: Sequence[Sample], device: torch.device | str = "cpu") -> MicroBatch:
    """Lays the samples end to end. A completion's last token predicts nothing and stays out of the row."""
    sequences = [sample.prompt_ids + sample.completion.token_ids[:-1] for sample in samples]
    starts = [0, *accumulate(map(len, sequences))]
    packed = PackedBatch(
        input_ids=torch.tensor([token for sequence in sequences for token in sequence], device=device),
        position_ids=torch.cat([torch.arange(len(sequence)) for sequence in sequences]).to(device),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=device),
    )
    return MicroBatch(
        samples=list(samples),
        packed=packed,
        rows=torch.cat([torch.arange(end - len(s), end) for s, end in zip(samples, starts[1:], strict=True)]).to(
            device
        ),
        target=torch.tensor([token for sample in samples for token in sample.completion.token_ids], device=device),
        cu_seqlens=torch.tensor([0, *accumulate(map(len, samples))], dtype=torch.int32, device=device),
    )
