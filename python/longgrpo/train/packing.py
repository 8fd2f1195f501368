"""Samples laid end to end: micro-batches within a token budget, and only the rows that the loss needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from longgrpo.model.packed_attention import PackedBatch
from longgrpo.tasks.sample import Sample


@dataclass(frozen=True)
class MicroBatch:
    """S samples in one packed row, M completion tokens in all, sample after sample."""

    samples: list[Sample]
    packed: PackedBatch
    rows: Tensor  # [M] int64: packed.input_ids[rows[i]] is the token before target[i]
    target: Tensor  # [M] int64: the completion tokens
    cu_seqlens: Tensor  # [S+1] int32: sample s has target[cu_seqlens[s]:cu_seqlens[s+1]]

    @property
    def advantages(self) -> Tensor:
        """[S] f32"""
        return torch.tensor([sample.advantage for sample in self.samples], device=self.target.device)

    @property
    def engine_logp(self) -> Tensor:
        """[M] f32: the engine's."""
        logprobs = [logprob for sample in self.samples for logprob in sample.completion.logprobs]
        return torch.tensor(logprobs, device=self.target.device)

    @property
    def support(self) -> list[list[int]] | None:
        """M lists: the tokens that each was sampled from; None where the engine does not tell."""
        parts = [sample.completion.support for sample in self.samples]
        return None if None in parts else [tokens for part in parts if part for tokens in part]

    def per_token(self, name: str) -> Tensor | None:
        """[M]: what the samples hold for each token, old_logp, say; None where they hold none."""
        parts = [getattr(sample, name) for sample in self.samples]
        return None if parts[0] is None else torch.cat(parts)


def micro_batches(
    samples: Sequence[Sample], token_budget: int, device: torch.device | str = "cpu", *, share_prompts: bool = True
) -> list[MicroBatch]:
    """Packs `samples` in their order. A micro-batch exceeds the budget only where one sample alone does."""
    return [pack(part, device, share_prompts=share_prompts) for part in split(samples, token_budget, share_prompts)]


def split(samples: Sequence[Sample], token_budget: int, share_prompts: bool) -> Iterator[list[Sample]]:
    """The samples of each micro-batch."""
    part: list[Sample] = []
    used = 0
    for sample in samples:
        shares_prompt = share_prompts and bool(part) and part[-1].group == sample.group
        alone = len(sample.prompt_ids) + len(sample)
        cost = len(sample) if shares_prompt else alone
        if part and used + cost > token_budget:
            yield part
            part, used, cost = [], 0, alone
        part.append(sample)
        used += cost
    if part:
        yield part


def pack(samples: Sequence[Sample], device: torch.device | str = "cpu", *, share_prompts: bool = True) -> MicroBatch:
    """One row: for each group its prompt once, then the completions that go on from it; a completion that has its
    prompt for itself goes on in the same sequence.

    A completion's last token predicts nothing and stays out; its first is predicted by the prompt's last row.
    """
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
            rows += range(prompt_end, len(ids))
        for tokens in inputs:
            rows += [prompt_end, *range(len(ids), len(ids) + len(tokens))]
            if tokens:
                _append(ids, positions, starts, tokens, first_position=len(prompt))
                prefix.append(prompt_segment)
    packed = PackedBatch(
        input_ids=torch.tensor(ids),
        position_ids=torch.tensor(positions),
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        prefix=prefix if max(prefix) >= 0 else None,
    )
    return MicroBatch(
        samples=list(samples),
        packed=packed,
        rows=torch.tensor(rows, device=device),
        target=torch.tensor([t for sample in samples for t in sample.completion.token_ids], device=device),
        cu_seqlens=torch.tensor([0, *accumulate(map(len, samples))], dtype=torch.int32, device=device),
    )


def _groups(samples: Sequence[Sample], share_prompts: bool) -> Iterator[list[Sample]]:
    if not share_prompts:
        return ([sample] for sample in samples)
    return (list(members) for _, members in groupby(samples, key=lambda sample: sample.group))


def _append(ids: list[int], positions: list[int], starts: list[int], tokens: list[int], first_position: int) -> None:
    ids += tokens
    positions += range(first_position, first_position + len(tokens))
    starts.append(len(ids))
