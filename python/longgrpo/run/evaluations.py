"""The evaluations of a run: before, during and after training, on each held-out set.

RUN/eval_before.json, eval_after.json, eval_prefill.json    every reply to the first set
    eval_before_NAME.json, ...                              and to the set NAME
    evaluations/step-000010.json, step-000010_NAME.json     the same, of an evaluation after step 10
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from longgrpo.config.run import TrainConfig
from longgrpo.config.task import RewardConfig
from longgrpo.errors import UserError
from longgrpo.run.files import read_json, write_file
from longgrpo.tasks.data import Problem
from longgrpo.tasks.evaluation import Evaluation, HeldOut, evaluate, paired_interval
from longgrpo.tasks.load_reward import load_reward
from longgrpo.tasks.rewards import Reward
from longgrpo.train.collect import Collector
from longgrpo.train.generators import random_states_kept, seed_everything
from longgrpo.train.ranks import merged

Say = Callable[[str], None]

_NAME = re.compile(r"step-(\d{6,})(?:_\w+)?\.json")


def _joined(parts: Sequence[Evaluation]) -> Evaluation:
    """Of the evaluations of a set's parts, a rank's each."""
    if len(parts) == 1:
        return parts[0]
    lists = ("questions", "replies", "scores", "samples", "sample_scores")
    whole: dict[str, Any] = {name: merged([getattr(part, name) for part in parts]) for name in lists}
    return Evaluation(**whole, reward=parts[0].reward)


class Evaluations:
    """What is evaluated, and what has been. problems: of each held-out set, "" the first."""

    def __init__(
        self, config: TrainConfig, directory: Path, problems: Mapping[str, list[Problem]], first_reward: Reward
    ) -> None:
        self._config, self._directory = config, directory
        self._rewards: dict[str, Reward] = {}  # loaded for the evaluation
        self.sets: dict[str, HeldOut] = {}
        for name, task in config.task.held_out.items():
            reward = self._reward(task.eval_reward) if task.eval_reward else first_reward
            own = problems[name], reward, config.task.eval_samples, task.eval_seed
            self.sets[name] = HeldOut(*own, turns=task.takes_turns)

    def _reward(self, function: str) -> Reward:
        if function not in self._rewards:
            self._rewards[function] = load_reward(RewardConfig(function))
        return self._rewards[function]

    def of(self, collector: Collector, name: str = "", prefill: str | None = None) -> Evaluation:
        """Evaluates a set now, each rank its part of it. The global random generators are seeded for it, and put back:
        training goes on as if there had been no evaluation."""
        ranks = collector.ranks
        with random_states_kept():
            seed_everything(self._config.train.seed)
            own = evaluate(
                collector.engine,
                collector.prompts,
                self.sets[name].part(ranks.rank, ranks.world),
                self._config.rollout,
                prefill,
                collector.conversations,
                collector.rewarding.loop,
            )
            return _joined(ranks.gather(own, "an evaluation"))

    def before(self, collector: Collector, say: Say) -> dict[str, float]:
        """The metrics of the untrained model; what an earlier process evaluated is read from its file."""
        prefill = self._config.task.eval_prefill
        metrics = self._all(collector, "eval_before", "before", say)
        if prefill and self.sets:
            self._kept(collector, "eval_prefill", "prefill", say, prefill=prefill)
        return metrics

    def during(self, collector: Collector, step: int, say: Say) -> dict[str, float]:
        """The metrics after a step."""
        if collector.ranks.is_first:
            self.forget_after(step - 1)
        return self._all(collector, f"evaluations/step-{step:06d}", f"after step {step}", say)

    def after(self, collector: Collector, step: int, say: Say) -> dict[str, Any]:
        """The trained model, after `step` steps, beside the untrained one; what the summary says of it, on rank 0."""
        results: dict[str, Any] = {}
        first = collector.ranks.is_first
        for name in self.sets:
            if first:
                self._path("eval_after", name).unlink(missing_ok=True)  # as the config is now
            if first and (during := self._path(f"evaluations/step-{step:06d}", name)).exists():
                self._read(during, name)
                write_file(self._path("eval_after", name), during.read_text("utf-8"))
            after = self._kept(collector, "eval_after", "after", say, name)
            results |= self._compared(name, after, say) if first else {}
        return results

    def forget_after(self, step: int) -> None:
        """Removes the evaluations of later steps, which will be done again."""
        for path in (self._directory / "evaluations").glob("step-*.json"):
            name = _NAME.fullmatch(path.name)
            if name and int(name[1]) > step:
                path.unlink()

    def check(self) -> None:
        """Raises UserError for an evaluation from before the training that cannot be read, or is of other problems: it
        could not be compared with one after it."""
        for name in self.sets:
            for when in ("before", "prefill"):
                if (path := self._path(f"eval_{when}", name)).exists():
                    self._read(path, name)

    def close(self) -> None:
        for reward in self._rewards.values():
            reward.close()

    def _all(self, collector: Collector, file: str, when: str, say: Say) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name in self.sets:
            prefix = f"eval/{name}/" if name else "eval/"
            found = self._kept(collector, file, when, say, name).metrics()
            metrics |= {f"{prefix}{key}": value for key, value in found.items()}
        return metrics

    def _kept(
        self, collector: Collector, file: str, when: str, say: Say, name: str = "", prefill: str | None = None
    ) -> Evaluation:
        """An evaluation with its file, which is rank 0's."""
        path, ranks = self._path(file, name), collector.ranks
        if made := ranks.of_first(lambda: self._read(path, name) if path.exists() else None, "an evaluation's file"):
            return made
        result = self.of(collector, name, prefill)
        if not ranks.is_first:
            return result
        path.parent.mkdir(exist_ok=True)
        write_file(path, json.dumps(asdict(result), indent=1))
        of = f" of {name}" if name else ""
        say(f"accuracy {when}: {result.accuracy:.3f} on {len(result.scores)} held-out problems{of}")
        return result

    def _read(self, path: Path, name: str) -> Evaluation:
        """The evaluation in a file, if it is of the problems of the set `name`."""
        remedy = "remove it to go on without it; before step 1 it is made again"
        held_out, tree = self.sets[name], read_json(path, remedy)
        try:
            found = Evaluation(**tree)
            found.metrics()
            same = found.questions == [problem.question for problem in held_out.problems]
            whole = len(found.questions) == len(found.scores) == len(found.replies)
        except (TypeError, ValueError, AttributeError, IndexError, RuntimeError, ZeroDivisionError) as error:
            raise UserError(f"{path}: is no evaluation ({error}); {remedy}") from error
        if not (same and whole):
            raise UserError(
                f"{path}: was made with other problems than task.eval_n, eval_seed, eval_name and the data give now: "
                f"set them as they were, or {remedy}"
            )
        if found.reward and found.reward != held_out.reward.name:
            raise UserError(
                f"{path}: was scored by {found.reward!r}, and task.eval_reward is {held_out.reward.name!r} now: set it "
                f"as it was, or {remedy}"
            )
        return found

    def _compared(self, name: str, after: Evaluation, say: Say) -> dict[str, Any]:
        """The summary's entries of a set: eval_before, eval_after, ..., with its name behind them."""
        of = f"_{name}" if name else ""
        files = {when: self._path(f"eval_{when}", name) for when in ("before", "prefill")}
        earlier = {when: self._read(path, name) for when, path in files.items() if path.exists()}
        results: dict[str, Any] = {f"eval_{when}{of}": evaluation.accuracy for when, evaluation in earlier.items()}
        results |= {f"eval_after{of}": after.accuracy, f"eval_n{of}": len(after.scores)}
        if after.sample_scores:
            results |= {f"eval_after{of}_samples": after.metrics()}
        if before := earlier.get("before"):
            low, high = paired_interval(before.solved, after.solved)
            results |= {f"eval_diff{of}": after.accuracy - before.accuracy, f"eval_diff_interval{of}": (low, high)}
            say(
                f"accuracy{f' of {name}' if name else ''} {before.accuracy:.3f} -> {after.accuracy:.3f}, "
                f"95 % interval of the paired difference [{low:+.3f}, {high:+.3f}]"
            )
        return results

    def _path(self, file: str, name: str) -> Path:
        return self._directory / f"{file}{f'_{name}' if name else ''}.json"
