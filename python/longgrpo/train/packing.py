"""Samples laid end to end: micro-batches within a token budget, and only the rows that the loss needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from longgrpo.loss import LossTokens
from longgrpo.loss.devices import on_device
from longgrpo.model.packed_attention import PackedBatch, pack_sequences
from longgrpo.tasks.sample import Rollout, Sample


@dataclass
class MicroBatch:
    """S samples in one packed row, M sampled tokens in all, sample after sample."""

    samples: list[Sample]
    packed: PackedBatch
    rows: Tensor  # [M] int64: packed.input_ids[rows[i]] is the token before target[i]
    target: Tensor  # [M] int64: the sampled tokens
    tokens: LossTokens  # advantages [S] (by turn: [M]), cu_seqlens [S+1], the rest [M]

    @property
    def support(self) -> list[list[int]] | None:
        """M lists: the tokens that each was sampled from; None if the engine does not report them."""
        parts = [sample.completion.support for sample in self.samples]
        return None if None in parts else [tokens for part in parts if part for tokens in part]

    def to(self, device: torch.device) -> MicroBatch:
        """On `device`, without waiting for it."""
        tokens: dict[str, Any] = {name: on_device(device, value) for name, value in vars(self.tokens).items()}
        return replace(
            self,
            packed=self.packed.to(device),
            rows=on_device(device, self.rows),
            target=on_device(device, self.target),
            tokens=LossTokens(**tokens),
        )


def micro_batches(
    rollout: Rollout, indices: Sequence[int], token_budget: int, *, share_prompts: bool = True
) -> list[MicroBatch]:
    """Packs the samples `indices` in their order, on the host. A micro-batch exceeds the budget only if one sample
    alone does."""
    parts = parts_of(rollout, indices, token_budget, share_prompts)
    return [pack(rollout, part, share_prompts=share_prompts) for part in parts]


def parts_of(rollout: Rollout, indices: Sequence[int], token_budget: int, share_prompts: bool) -> list[list[int]]:
    """Of the samples `indices` those of each micro-batch."""
    remaining = iter(indices)
    parts = split([rollout.samples[i] for i in indices], token_budget, share_prompts)
    return [[next(remaining) for _ in part] for part in parts]


def split(samples: Sequence[Sample], token_budget: int, share_prompts: bool) -> Iterator[list[Sample]]:
    """The samples of each micro-batch."""
    part: list[Sample] = []
    used = 0
    for sample in samples:
        shares_prompt = share_prompts and bool(part) and part[-1].group == sample.group
        length = len(sample.completion.token_ids)
        alone = len(sample.prompt_ids) + length
        cost = length if shares_prompt else alone
        if part and used + cost > token_budget:
            yield part
            part, used, cost = [], 0, alone
        part.append(sample)
        used += cost
    if part:
        yield part


def pack(rollout: Rollout, indices: Sequence[int], *, share_prompts: bool = True) -> MicroBatch:
    """One row: for each group its prompt once, then the completions that go on from it; a completion that has its
    prompt for itself continues in the same sequence.

    A completion's last token predicts nothing and stays out; its first is predicted by the prompt's last row. Tokens
    that were given between its turns are read and never predicted.
    """
    samples = [rollout.samples[i] for i in indices]
    tokens = rollout.tokens_of(indices)
    packed, rows = _packed(samples, share_prompts)
    return MicroBatch(
        samples,
        packed,
        torch.tensor(rows),
        rollout.token_ids[tokens],
        LossTokens(
            advantages=_advantages(rollout, indices),
            cu_seqlens=torch.tensor([0, *accumulate(map(len, samples))], dtype=torch.int32),
            sampling_logp=rollout.sampling_logp[tokens],
        ),
    )


def _advantages(rollout: Rollout, indices: Sequence[int]) -> Tensor:
    """[S], or [M] of advantages by turn."""
    if rollout.turn_advantages is None:
        return rollout.advantages.flatten()[list(indices)]
    parts = []
    for i in indices:
        lengths = torch.tensor([turn.end - turn.begin for turn in rollout.samples[i].completion.turns])
        parts.append(rollout.turn_advantages[i].repeat_interleave(lengths))
    return torch.cat(parts)


def _packed(samples: Sequence[Sample], share_prompts: bool) -> tuple[PackedBatch, list[int]]:
    """The packed row, and of each sampled token the row that predicts it."""
    ids: list[int] = []
    positions: list[int] = []
    starts: list[int] = [0]
    prefix: list[int] = []
    rows: list[int] = []
    for members in _groups(samples, share_prompts):
        prompt = members[0].prompt_ids
        prompt_segment, prompt_end = len(prefix), len(ids) + len(prompt) - 1
        inputs = [member.completion.token_ids[:-1] for member in members]
        first = prompt if len(members) > 1 else prompt + inputs.pop()
        _append(ids, positions, starts, first, first_position=0)
        prefix.append(-1)
        if not inputs:
            rows += _sampled(members[0], range(prompt_end, len(ids)))
        for member, tokens in zip(members, inputs, strict=False):
            rows += _sampled(member, [prompt_end, *range(len(ids), len(ids) + len(tokens))])
            if tokens:
                _append(ids, positions, starts, tokens, first_position=len(prompt))
                prefix.append(prompt_segment)
    shared = prefix if max(prefix) >= 0 else None
    return pack_sequences(torch.tensor(ids), torch.tensor(positions), starts, shared), rows


def _sampled(sample: Sample, rows: Sequence[int]) -> Sequence[int]:
    """Of the rows that predict its tokens, those of the sampled ones."""
    completion = sample.completion
    return [rows[place] for place in completion.sampled_at] if completion.turns else rows


def _groups(samples: Sequence[Sample], share_prompts: bool) -> Iterator[list[Sample]]:
    if not share_prompts:
        return ([sample] for sample in samples)
    return (list(members) for _, members in groupby(samples, key=lambda sample: sample.group))


def _append(ids: list[int], positions: list[int], starts: list[int], tokens: list[int], first_position: int) -> None:
    ids += tokens
    positions += range(first_position, first_position + len(tokens))
    starts.append(len(ids))
