"""Reward functions as the trainer calls them: found by name, checked, timed, and counted if they fail.

A plain function gets all completions of the rollout in one call, as in TRL; an `async def` gets one group a call, as
soon as the group is complete and while others are still sampled.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longgrpo.errors import RewardError
from longgrpo.tasks.data import Problem, Prompt, Reply, columns_of
from longgrpo.tasks.event_loop import EventLoop, is_async
from longgrpo.tasks.isolated import Notes, Worker
from longgrpo.tasks.reward_model import RewardModel
from longgrpo.tasks.sample import Sample

log = logging.getLogger(__name__)

Function = Callable[..., Any]
"""f(prompts, completions, completion_ids, **columns, trainer_state, log_extra, log_metric) -> one number, or None for
"not applicable", per completion."""


GRACE = 1.0  # seconds from the moment at which a timeout cancels a call until it counts as one that blocks

_TRAINERS = re.compile(
    r"(reward|eval|seconds|watch|completion_length|completions|advantages|tokens_per_second|offload|predicted_bytes|"
    r"measured_bytes|peak|episodes?|turns|tools?)[/_].*|calls/.*|step|epoch|groups_.*|loss|policy_loss|kl|reverse_kl|entropy|"
    r"entropy_coef|ratio_(mean|min|max)|clip_(low|high)|active|tokens|skipped_updates|grad_norm|learning_rate|"
    r"engine_trainer_logprob_diff_.*|importance_.*|sampling_.*|weight_sync_bytes|probe_logprob_diff"
)


def is_trainers(metric: str) -> bool:
    """Whether a metric of this name is the trainer's own (docs/report.md lists them)."""
    return _TRAINERS.fullmatch(metric) is not None


@dataclass
class Scores:
    """What a function returns for the B completions of one call."""

    values: Tensor  # [B] float64, NaN if the function does not apply; of values by turn their sum
    turns: list[list[float] | None] = field(default_factory=list)
    """Of each completion the values of its turns, from a function that returns one each."""
    notes: Notes = field(default_factory=Notes)
    failed: bool = False


@dataclass
class Logged:
    """What functions log besides rewards."""

    values: dict[str, list[float]] = field(default_factory=dict)
    """By metric, of each call."""
    failed: Counter[str] = field(default_factory=Counter)
    """Calls that have failed, by function."""

    def add(self, more: Logged) -> None:
        for name, values in more.values.items():
            self.values.setdefault(name, []).extend(values)
        self.failed += more.failed


@dataclass
class Reward:
    """A named function, its weight in the sum, and what happens if it is late or fails.

    Raises RewardError, naming the function, unless on_error is "none": then it does not apply to that call.
    """

    name: str
    function: Function | None
    weight: float = 1.0
    parameters: dict[str, Any] = field(default_factory=dict)
    timeout: float | None = None
    on_error: str = "raise"
    worker: Worker | None = None  # calls its own copy of the function

    @property
    def sees_sent(self) -> bool:
        """Whether it gets prompts as they are sent: a model judges the conversation, whatever the row has."""
        return isinstance(self.function, RewardModel)

    @property
    def is_async(self) -> bool:
        return self.worker is None and is_async(self.function)

    def __call__(
        self,
        prompts: list[Prompt],
        completions: list[Reply],
        completion_ids: list[list[int]],
        columns: dict[str, list[Any]],
        state: Any = None,
        loop: EventLoop | None = None,
    ) -> Scores:
        """The scores of B completions, whatever kind of function it is; an async one runs on `loop`, if given."""
        own = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, "trainer_state": state}
        arguments, count = {**columns, **own, **self.parameters}, len(completions)
        if not self.is_async:
            return self.score(arguments, count)
        calls = loop or EventLoop()
        try:
            return self.result(calls.submit(self.score_async(arguments, count)), count, calls, self.deadline())
        finally:
            if loop is None:
                calls.close()

    def deadline(self) -> float | None:
        """The moment at which an async call that begins now has to be done, on time.monotonic()'s clock: its timeout
        has cancelled it before, unless it blocks."""
        return None if self.timeout is None else time.monotonic() + self.timeout + GRACE

    def result(self, call: Future[Scores], count: int, calls: EventLoop, deadline: float | None) -> Scores:
        """What an async call on `count` completions gives; at the deadline its thread is given up."""
        try:
            return call.result(None if deadline is None else max(deadline - time.monotonic(), 0))
        except (TimeoutError, FutureTimeoutError) as error:
            calls.give_up()
            return self._failed(error, count)

    def score(self, arguments: dict[str, Any], count: int) -> Scores:
        try:
            given, process = arguments["completions"], os.getpid()
            arguments = _own(arguments)
            if self.worker:
                arguments.pop("environments", None)  # they are of this process
                values, notes = self.worker.call(arguments, self.timeout)
            else:
                assert self.function
                notes = Notes()
                values = self.function(**arguments, **notes.arguments())
            return self._scores(values, notes, given)
        except (Exception, SystemExit) as error:  # sys.exit(0) would end the run as if it were done
            if os.getpid() != process:
                os._exit(0)  # a child that the function forked: the run is not its own
            return self._failed(error, count, given)

    async def score_async(self, arguments: dict[str, Any], count: int) -> Scores:
        assert self.function
        notes = Notes()
        try:
            call = self.function(**_own(arguments), **notes.arguments())
            values = await asyncio.wait_for(call, self.timeout)
            return self._scores(values, notes, arguments["completions"])
        except (Exception, SystemExit) as error:
            return self._failed(error, count, arguments["completions"])

    def _scores(self, values: Any, notes: Notes, completions: Sequence[Reply]) -> Scores:
        count = len(completions)
        try:
            values = list(values)
        except TypeError:
            raise RewardError(
                f"reward function {self.name} returned {type(values).__name__}: "
                "must be a list with one number or None per completion"
            ) from None
        for what, entries in {"returned": values, **{f"logged as {k!r}": v for k, v in notes.extra.items()}}.items():
            if len(entries) != count:
                raise RewardError(f"reward function {self.name} {what} {len(entries)} values for {count} completions")
        turns = [list(value) if isinstance(value, list | tuple) else None for value in values]
        for i, (own, completion) in enumerate(zip(turns, completions, strict=True)):
            if own is None:
                continue
            if len(own) != (of_turns := _turns(completion)) or None in own or not all(map(_usable, own)):
                raise RewardError(
                    f"reward function {self.name} returned {own!r:.80} for completion {i}: values by turn are "
                    f"{of_turns} finite numbers, one for each message of the assistant"
                )
            values[i] = sum(own)
        for i, value in enumerate(values):
            if not _usable(value):
                raise RewardError(
                    f"reward function {self.name} returned {value!r} for completion {i}: must be a finite number, "
                    "or None where it does not apply"
                )
        if taken := [name for name in notes.metrics if is_trainers(name)]:
            raise RewardError(
                f"reward function {self.name} logs the metric {taken[0]!r}, which is the trainer's: take another name"
            )
        numbers = [math.nan if value is None else float(value) for value in values]
        return Scores(torch.tensor(numbers, dtype=torch.float64), turns, notes)

    def _failed(self, error: BaseException, count: int, completions: Sequence[Reply] = ()) -> Scores:
        if isinstance(error, (TimeoutError, asyncio.TimeoutError, FutureTimeoutError)) and self.timeout:
            error = RewardError(f"reward function {self.name} took longer than its timeout of {self.timeout} s")
        elif not isinstance(error, RewardError):
            raised = str(error) if self.worker else f"{type(error).__name__}: {error} ({_where(error)})"
            error = RewardError(f"reward function {self.name} raised {raised}{_form_of(raised, completions)}")
        if self.on_error == "raise":
            raise error
        log.warning("%s; it does not apply to these %d completions (on_error: none)", error, count)
        return Scores(torch.full((count,), math.nan, dtype=torch.float64), failed=True)

    def close(self) -> None:
        if self.worker:
            self.worker.close()


def _own(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of one call, in objects of its own for each completion: a function may change what it is handed,
    which neither its group, nor another function, nor the next evaluation sees. Environments are the very ones."""
    return {
        name: value
        if name == "environments"
        else [copy.deepcopy(entry) for entry in value]
        if isinstance(value, list)
        else copy.deepcopy(value)
        for name, value in arguments.items()
    }


def _turns(completion: Reply) -> int:
    """The assistant's messages."""
    return 1 if isinstance(completion, str) else sum(message["role"] == "assistant" for message in completion)


def _usable(value: Any) -> bool:
    try:
        return value is None or math.isfinite(value)
    except TypeError:
        return False


def _form_of(raised: str, completions: Sequence[Reply]) -> str:
    """Which form the completions have, after an error that a function for the other form raises."""
    if not completions or not raised.startswith(("TypeError", "AttributeError")):
        return ""
    if isinstance(completions[0], str):
        return "; its completions are text, since the prompts are: rows whose prompt is messages give messages"
    return '; its completions are messages, since the prompts are: the text of one is completion[-1]["content"]'


def _where(error: BaseException) -> str:
    frame = inspect.getinnerframes(error.__traceback__)[-1] if error.__traceback__ else None
    return f"{frame.filename}:{frame.lineno}" if frame else "unknown place"


class Rewarding:
    """Runs the reward functions of a run; async ones run during the rollout."""

    def __init__(self, rewards: Sequence[Reward], loop: EventLoop | None = None) -> None:
        """loop: the run's; close() closes it."""
        self.rewards = rewards
        self.weights = torch.tensor([reward.weight for reward in rewards], dtype=torch.float64)  # [F]
        self._logged, self._everywhere = Logged(), Logged()  # by the functions here; by those of all ranks
        self._begun: dict[int, dict[str, Future[Scores]]] = {}  # by group
        self.loop = loop or EventLoop()

    def begin(self, problem: Problem, group: Sequence[Sample], state: Any) -> None:
        """The completions of one prompt are all there: the async functions set to work on them."""
        waiting = [reward for reward in self.rewards if reward.is_async]
        arguments = _arguments([problem] * len(group), group, state) if waiting else {}
        self._begun[group[0].group] = {
            reward.name: self.loop.submit(reward.score_async({**arguments, **reward.parameters}, len(group)))
            for reward in waiting
        }

    def finish(self, problems: Sequence[Problem], samples: Sequence[Sample], state: Any) -> Tensor:
        """[F, B] float64: what F functions give to B samples, group after group; NaN: the function does not apply. The
        columns that they log go into the samples. problems: one a sample."""
        forms = {sent: _arguments(problems, samples, state, sent) for sent in {one.sees_sent for one in self.rewards}}
        values = torch.empty(len(self.rewards), len(samples), dtype=torch.float64)
        for row, reward in zip(values, self.rewards, strict=True):
            if reward.is_async:
                sizes, deadline = Counter(sample.group for sample in samples), reward.deadline()
                parts = [self._result(group, reward, size, deadline) for group, size in sizes.items()]
            else:
                parts = [reward.score({**forms[reward.sees_sent], **reward.parameters}, len(samples))]
            row.copy_(torch.cat([part.values for part in parts]))
            _note(parts, samples)
            by_turn = [own for part in parts for own in part.turns or [None] * len(part.values)]
            for sample, own in zip(samples, by_turn, strict=True):
                if own is not None:
                    sample.turn_rewards[reward.name] = own
            for part in parts:
                self._logged.add(Logged(part.notes.metrics))
            self._logged.failed[reward.name] += sum(part.failed for part in parts)
        self._begun.clear()
        values[:, [sample.failed for sample in samples]] = math.nan
        return values

    def metrics(self) -> dict[str, float]:
        """Since the last call, the means of what the functions logged, and the failed calls of those that may fail."""
        self._everywhere.add(self.drain())
        logged, self._everywhere = self._everywhere, Logged()
        metrics = {name: sum(values) / len(values) for name, values in logged.values.items()}
        failed = {r.name: logged.failed[r.name] for r in self.rewards if r.on_error == "none"}
        return metrics | {f"reward/{name}/failed_calls": count for name, count in failed.items()}

    def drain(self) -> Logged:
        """What was logged here since the last call, for add() of every rank."""
        logged, self._logged = self._logged, Logged()
        return logged

    def add(self, logged: Logged) -> None:
        """Counts in the next metrics what the functions of a rank have logged."""
        self._everywhere.add(logged)

    def close(self) -> None:
        """Stops the processes and the thread of the functions; calls in progress are canceled."""
        self._cancel()
        for reward in self.rewards:
            reward.close()
        self.loop.close()

    def _result(self, group: int, reward: Reward, size: int, deadline: float | None) -> Scores:
        try:
            return reward.result(self._begun[group][reward.name], size, self.loop, deadline)
        except RewardError:
            self._cancel()
            raise

    def _cancel(self) -> None:
        for futures in self._begun.values():
            for future in futures.values():
                future.cancel()
        self._begun.clear()


def _arguments(
    problems: Sequence[Problem], samples: Sequence[Sample], state: Any, sent: bool = False
) -> dict[str, Any]:
    """What every function gets; problems: one a sample; sent: see Problem.form."""
    return {
        **columns_of(problems),
        "prompts": [sample.prompt(problem, sent) for problem, sample in zip(problems, samples, strict=True)],
        "completions": [sample.reply(problem, sent) for problem, sample in zip(problems, samples, strict=True)],
        "completion_ids": [sample.completion.sampled_ids for sample in samples],
        "trainer_state": state,
        **environments_of(samples),
    }


def environments_of(samples: Sequence[Sample]) -> dict[str, Any]:
    """TRL's `environments`, for a run that has them."""
    found = [sample.episode and sample.episode.environment for sample in samples]
    return {"environments": found} if any(one is not None for one in found) else {}


def turn_returns(sample: Sample, values: Sequence[float], rewards: Sequence[Reward]) -> list[float]:
    """What a sample has earned from each of its turns on: of a function with values by turn the turn's own and those of
    later turns, of another its whole value. values: of each function, NaN if it does not apply; empty if none does."""
    applies = [(reward, value) for reward, value in zip(rewards, values, strict=True) if not math.isnan(value)]
    if not applies:
        return []
    turns = range(len(sample.completion.turns))
    return [
        sum(
            reward.weight
            * (sum(sample.turn_rewards[reward.name][turn:]) if reward.name in sample.turn_rewards else value)
            for reward, value in applies
        )
        for turn in turns
    ]


def _note(parts: Sequence[Scores], samples: Sequence[Sample]) -> None:
    """The logged columns of each part go to its samples."""
    remaining = iter(samples)
    for part in parts:
        for i, sample in zip(range(len(part.values)), remaining, strict=False):
            sample.extra |= {column: values[i] for column, values in part.notes.extra.items()}
