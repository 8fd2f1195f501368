"""Episodes: completions of several turns, with tokens between them that are given and not sampled.

Tokens are appended and never made again from text: the next turn reads the very ids that were sampled and given.
"""

from __future__ import annotations

import queue
from collections.abc import Awaitable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Literal

from longgrpo.config.sampling import Sampling
from longgrpo.rollout.protocol import Completion, Finished, Turn, Turns, seed_for


@dataclass(frozen=True)
class Request:
    """A turn to be sampled."""

    index: int
    prompt: list[int]
    sampling: Sampling
    seed: int


@dataclass
class _Episode:
    prompt: list[int]
    seed: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    support: list[list[int]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    def append(self, turn: Completion, cached: int) -> None:
        begin = len(self.token_ids)
        self.token_ids += turn.token_ids
        self.logprobs += turn.logprobs
        self.support += turn.support or []
        self.turns.append(Turn(begin, len(self.token_ids), cached))

    def completion(self, finish: Literal["stop", "length"]) -> Completion:
        support = list(self.support) if self.support else None
        return Completion(list(self.token_ids), list(self.logprobs), finish, support, tuple(self.turns))


class Episodes:
    """The episodes of one generate(): the turns to be sampled, and the calls that are awaited. An engine samples what
    `ready` returns, and hands it to `sampled`, until nothing is left.

    An episode ends with "stop" if goes_on says that it is over, and with "length" at a bound: a turn that was cut off
    asks for nothing, and of a reply that leaves no room for another turn nothing is appended.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        context: int,
        turns: Turns,
        finished: Finished | None = None,
    ) -> None:
        """context: tokens of prompt and completion together."""
        self._sampling, self._context, self._turns, self._finished = sampling, context, turns, finished
        self._episodes = [_Episode(list(prompt), seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        self._ready = list(range(len(prompts)))
        self._calls: dict[int, Future[list[int] | None]] = {}
        self._answered: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._completions: dict[int, Completion] = {}

    def ready(self, *, wait: bool, every: bool = False) -> list[Request]:
        """The turns that can be sampled now. wait: for an answer, if there is none and calls are awaited; every: for
        the answers to all calls. Empty, if it waited: every episode is complete or is being sampled.

        Raises what goes_on raised.
        """
        while self._calls and (every or (wait and not self._ready)):
            self._take(self._answered.get())
        while not self._answered.empty():
            self._take(self._answered.get())
        requests = [self._request(i) for i in sorted(self._ready)]
        self._ready.clear()
        return requests

    def sampled(self, i: int, turn: Completion, cached: int = 0) -> None:
        """A turn of episode i. cached: tokens before it that the engine read from its cache."""
        episode = self._episodes[i]
        episode.append(turn, cached)
        if turn.finish_reason == "length":
            self._end(i, "length")
            return
        call = self._turns.submit(_awaited(self._turns.goes_on(i, episode.completion("stop"))))
        self._calls[i] = call
        call.add_done_callback(lambda _: self._answered.put(i))

    def completions(self) -> list[Completion]:
        return [self._completions[i] for i in range(len(self._episodes))]

    def cancel(self) -> None:
        """Gives up the calls that are awaited."""
        for call in self._calls.values():
            call.cancel()

    def _take(self, i: int) -> None:
        given = self._calls.pop(i).result()
        episode = self._episodes[i]
        if given is None:
            self._end(i, "stop")
        elif len(episode.turns) == self._turns.most or self._left(episode) <= len(given):
            self._end(i, "length")
        else:
            episode.token_ids += given
            self._ready.append(i)

    def _left(self, episode: _Episode) -> int:
        """Tokens that the episode may still have."""
        taken = len(episode.token_ids)
        return min(self._sampling.max_tokens, self._context - len(episode.prompt)) - taken

    def _request(self, i: int) -> Request:
        episode = self._episodes[i]
        left = self._left(episode)
        most = left if self._turns.tokens is None else min(left, self._turns.tokens)
        sampling = replace(self._sampling, max_tokens=most)
        return Request(i, episode.prompt + episode.token_ids, sampling, turn_seed(episode.seed, len(episode.turns)))

    def _end(self, i: int, finish: Literal["stop", "length"]) -> None:
        self._completions[i] = self._episodes[i].completion(finish)
        if self._finished:
            self._finished(i, self._completions[i])


def turn_seed(seed: int, turn: int) -> int:
    """The seed of a turn, from 0, of the episode that has `seed`: the first turn is sampled as a completion is."""
    return seed_for(seed, turn, 0, 0) if turn else seed


async def _awaited(answer: Awaitable[list[int] | None]) -> list[int] | None:
    return await answer
