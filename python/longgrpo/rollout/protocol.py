"""The rollout engine: what the trainer requires of an engine that samples completions."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from longgrpo.config.rollout import RolloutConfig
from longgrpo.config.sampling import Sampling
from longgrpo.model.load import context_length
from longgrpo.model.shared_operators import SharedOperators

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class Turn(NamedTuple):
    """The sampled tokens [begin, end) of a completion of several turns."""

    begin: int
    end: int
    cached: int = 0
    """Tokens before `begin`, the prompt's among them, that the engine read from its cache."""


@dataclass(frozen=True)
class Completion:
    """token_ids include the end token if it was sampled; logprobs holds one float per sampled token, under the
    distribution it was sampled from (temperature and truncation included); support holds, for each sampled token, the
    tokens that it was sampled from, if the engine reports them.

    With `turns` the tokens between two of them were given; without, all were sampled."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    support: list[list[int]] | None = None
    turns: tuple[Turn, ...] = ()

    @property
    def sampled_at(self) -> Sequence[int]:
        """The places of the sampled tokens in token_ids."""
        if not self.turns:
            return range(len(self.token_ids))
        return [place for turn in self.turns for place in range(turn.begin, turn.end)]

    @property
    def sampled_ids(self) -> list[int]:
        return [self.token_ids[place] for place in self.sampled_at] if self.turns else self.token_ids


def batched_tokens(max_length: int) -> int:
    """Tokens of one forward of the engine on a GPU, for a context of `max_length`."""
    return min(8192, max(2048, max_length))


Finished = Callable[[int, Completion], None]
GoesOn = Callable[[int, Completion], Awaitable[list[int] | None]]
Submit = Callable[[Coroutine[Any, Any, Any]], Future[Any]]


@dataclass(frozen=True)
class Turns:
    """What follows the turns of a completion."""

    goes_on: GoesOn
    """goes_on(i, completion so far) is awaited when a turn of entry i has ended by itself: the ids of the tokens before
    its next turn, or None: the episode is over."""
    submit: Submit
    """Runs a coroutine on the run's event loop."""
    most: int
    """Turns of an episode."""
    tokens: int | None = None
    """Sampled tokens of a turn; None: as many as the episode has left."""
    in_rounds: bool = False
    """Whether a turn of any entry begins only when the turns of all, and what they wait for, have ended: what shares a
    forward then depends on no clock."""


class RolloutEngine(Protocol):
    name: str
    model: PreTrainedModel
    """The model to train: its parameters are the engine's own, or views of them."""
    cache_bytes: int
    """Size of a rollout's key-value cache, whatever its length; 0 if the cache grows with each sampled token."""
    shared: SharedOperators | None
    """The operators that the engine runs and the trainer is to run (rollout.bitwise)."""

    def attach(self, model: PreTrainedModel | PeftModel) -> None:
        """Makes generate() sample from `model`: engine.model itself, or engine.model wrapped by PEFT."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        finished: Finished | None = None,
        turns: Turns | None = None,
    ) -> list[Completion]:
        """One completion per entry of `prompts`, in order, entry i sampled with seeds[i]. A prompt that leaves no room
        for a token within max_length() raises ValueError; a completion ends with "length" if the context ends.
        finished(i, completion) is called as soon as entry i is complete, once for each. With `turns` a completion goes
        on after the end of a turn, and sampling.max_tokens bounds all that follows the prompt."""

    def weights_changed(self) -> int:
        """Drops what the engine has cached of the old weights, and copies the weights that it does not share. To be
        called after every optimizer step. Returns the bytes of that copy."""

    def drop_caches(self) -> None:
        """Drops the caches of earlier rollouts."""

    def max_length(self) -> int:
        """The context length in tokens, prompt and completion together."""

    def close(self) -> None:
        """Gives the engine's memory back; the engine cannot be used afterwards."""


def max_length(config: RolloutConfig, directory: Path) -> int:
    """The context length to use, in tokens; raises ValueError if `config` asks for more than the model has."""
    context = context_length(directory)
    if config.max_model_len is not None and not 2 <= config.max_model_len <= context:
        raise ValueError(
            f"rollout.max_model_len = {config.max_model_len}: the model's context is {context} tokens, "
            "and a prompt and its completion need two"
        )
    return config.max_model_len or context


def check_prompts(prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_length: int) -> None:
    """Raises ValueError for what no engine can sample from, before any work is done."""
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds: each request has its own")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty")
        if len(prompt) >= max_length:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; the context holds {max_length}, prompt and completion together: "
                "shorten the prompt or raise rollout.max_model_len"
            )


def seed_for(base: int, step: int, prompt_index: int, completion_index: int) -> int:
    """A 63-bit seed, the same in every process and on every machine.

    One seed for all requests would sample the completions of a group alike, and leave them no advantage.
    """
    key = f"{base}/{step}/{prompt_index}/{completion_index}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
