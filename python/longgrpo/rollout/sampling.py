"""How a completion is sampled, and the seed of each request."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """One request's sampling parameters.

    temperature 0 is greedy decoding; its logprobs are those of temperature 1. top_k 0, top_p 1 and min_p 0 are off.
    The end tokens are the model's own (generation_config.json), to which stop_token_ids adds.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens = {self.max_tokens}: a completion has at least one token")
        if self.temperature < 0:
            raise ValueError(f"temperature = {self.temperature}: must be 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: must lie in (0, 1], where 1 is off")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k}: must be 0 (off) or above")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p = {self.min_p}: must lie in [0, 1], where 0 is off")


def seed_for(base: int, step: int, prompt_index: int, completion_index: int) -> int:
    """A 63-bit seed, the same in every process and on every machine.

    One seed for all requests would sample the completions of a group alike, and leave them no advantage.
    """
    key = f"{base}/{step}/{prompt_index}/{completion_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
