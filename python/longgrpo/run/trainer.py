"""A run from its config to its summary: built, evaluated, trained step by step, saved, resumed."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from longgrpo.checks.rehearsal import forecast_run
from longgrpo.config.run import TrainConfig, load_config
from longgrpo.errors import ConfigError, TrainingError
from longgrpo.model.load import end_token_ids, load_tokenizer, published_name, resolve_model
from longgrpo.model.lora import save_adapter, with_adapter
from longgrpo.offload import OffloadEngine
from longgrpo.rollout.factory import make_engine
from longgrpo.rollout.probe import Probe
from longgrpo.rollout.protocol import max_length
from longgrpo.run import checkpoint
from longgrpo.run.before import rehearsed, spread_of
from longgrpo.run.callbacks import Callbacks
from longgrpo.run.card import write_card
from longgrpo.run.claim import Claim, claim_new, names_at_end, names_of
from longgrpo.run.endings import as_user_error
from longgrpo.run.evaluations import Evaluations
from longgrpo.run.export import write_model
from longgrpo.run.files import replace_directory, write_file
from longgrpo.run.given import config_with, objects_of
from longgrpo.run.problems import problems_of
from longgrpo.run.progress import Progress
from longgrpo.run.signals import StopRequest
from longgrpo.run.started import write_config
from longgrpo.run.summary import summary_of
from longgrpo.run.tracking import Tracker, check_installed
from longgrpo.run.tuning import tune_run
from longgrpo.run.watching import Watched
from longgrpo.tasks.data import Problem
from longgrpo.tasks.episodes import make_conversations, prompts_for
from longgrpo.tasks.evaluation import Evaluation
from longgrpo.tasks.event_loop import EventLoop
from longgrpo.tasks.rewards import Rewarding, load_reward
from longgrpo.train.collect import Collector
from longgrpo.train.entropy import EntropyControl
from longgrpo.train.generators import random_states, seed_everything, set_random_states
from longgrpo.train.loop import Loop, step
from longgrpo.train.losses import PolicyLoss
from longgrpo.train.metrics import best_metric, peak_memory
from longgrpo.train.state import make_state


class Trainer:
    """One run in one directory: `Trainer(config, directory).run()`, or `Trainer.resume(directory).run()`.

    Both raise UserError for errors that the user can correct, before training if they can be known by then.
    """

    config: TrainConfig
    directory: Path
    claim: Claim
    loop: Loop
    progress: Progress
    evaluations: Evaluations
    callbacks: Callbacks
    stop: StopRequest
    watched: Watched
    _whole: bool | None = None  # whether the state is that after progress.step; None: before training

    def __init__(
        self,
        config: TrainConfig | Mapping[str, Any],
        directory: Path | str | None = None,
        *,
        force: bool = False,
        name: str = "run",
        reward_functions: Sequence[Callable[..., Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        tools: Sequence[Callable[..., Any]] | None = None,
        environment_factory: Callable[..., Any] | None = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        """config: as build_config makes it, or its tree of plain values. directory: default output_dir, else a new one
        in runs, called `name`. What follows is given as objects by a notebook or a script: see longgrpo.run.given."""
        given = dict(
            reward_functions=reward_functions,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            tools=tools,
            environment_factory=environment_factory,
            callbacks=callbacks,
        )
        config = config_with(config, given)
        place = directory or config.output_dir
        self.claim = Claim(Path(place)) if place else claim_new(Path("runs"), name)
        try:
            begun, ended = names_of(config)
            if self.claim.holds_run:
                raise ConfigError(
                    f"{place} holds a run already: resume it with `longgrpo train --resume {place}`, or set another "
                    "output_dir"
                )
            self.claim.check([*begun, *ended])
            self._build(config, self.claim.directory, force, given)
            self.claim.add(begun)
            write_config(self.directory, self.config, step=0)
        except BaseException:
            self.claim.undo()
            raise

    @classmethod
    def resume(
        cls, directory: Path, overrides: list[str] | None = None, *, force: bool = False, **given: Any
    ) -> Trainer:
        """The run in `directory` at its newest checkpoint, or at its start if it has none yet; overrides such as
        `--train.steps 100` change its config. given: functions, data sets and callbacks as the run was begun with."""
        if not (directory / "config.yaml").is_file():
            raise ConfigError(f"{directory}: holds no run (no config.yaml is in it)")
        trainer = cls.__new__(cls)
        trainer.claim = Claim(directory)
        try:
            config = load_config(directory / "config.yaml", overrides)
            begun, ended = names_of(config_with(config, given))
            if "config.yaml" not in trainer.claim.made:
                trainer.claim.adopt(config)
            trainer.claim.check([*begun, *ended])
            saved = checkpoint.checkpoints(directory)
            if saved:
                checkpoint.verify(saved[-1])
            trainer._build(config, directory, force, given)
            if saved:
                trainer._restore(saved[-1])
            trainer.claim.add(begun)
            write_config(directory, trainer.config, trainer.progress.step)
        except BaseException:
            trainer.claim.undo()
            raise
        return trainer

    def run(self) -> dict[str, Any] | None:
        """Trains up to train.steps and closes the engine. Returns the summary; None if a signal stopped the run:
        it is saved, and `stop.signal` says which signal."""
        done = self.progress.step if checkpoint.checkpoints(self.directory) else -1  # step 0: the evaluation before
        try:
            tracker = Tracker(self.directory, self.config, done)
            self.watched = Watched(self.config, tracker)
            self._start = time.monotonic() - self.progress.seconds
            with StopRequest(tracker.say) as self.stop, tracker:
                try:
                    return self._run(tracker)
                except (Exception, SystemExit) as error:
                    saved, told = self._save_what_is_whole(), as_user_error(error)
                    if told is None:
                        tracker.say(saved)
                        raise
                    raise type(told)(f"{told}\n{saved}".rstrip()) from error
        finally:
            self.close()

    def close(self) -> None:
        """Ends the rewards' processes and releases the engine's memory; run() calls it."""
        self.loop.collector.close()
        self.evaluations.close()
        self.loop.collector.engine.close()
        if self.loop.state.offload:
            self.loop.state.offload.close()
        self.claim.close()

    def load_weights(self, saved: Path) -> None:
        """Loads the weights of a checkpoint, and nothing else from it."""
        checkpoint.load_weights(saved, checkpoint.read_tensors(saved), self._weights())
        self.loop.state.masters.publish()
        self.loop.collector.engine.weights_changed()

    @property
    def held_out(self) -> list[Problem]:
        """The problems of the first held-out set."""
        return self.evaluations.sets[""].problems if self.evaluations.sets else []

    def evaluate(self, prefill: str | None = None, name: str = "") -> Evaluation:
        """Replies of the model as it is to the problems of a held-out set, scored alike whenever it is done."""
        return self.evaluations.of(self.loop.collector, name, prefill)

    def _run(self, tracker: Tracker) -> dict[str, Any] | None:
        progress, steps, every = self.progress, self.config.train.steps, self.config.train.save_steps
        tune_run(self.directory, self.loop.state, self.config.memory.autotune, tracker.say)
        if progress.step == 0:
            self._look_at_untrained(tracker)
            seed_everything(self.config.train.seed)  # whatever was looked at, step 1 begins alike
        memory: dict[str, int] = {}
        if progress.step < steps:
            (self.directory / "summary.json").unlink(missing_ok=True)  # of an end with fewer steps
        if self._forecast and progress.step < steps and not self.stop:
            memory = rehearsed(self._forecast, self.loop, tracker.say)
        state, patience = self.loop.state, self.config.task.eval_patience
        self.callbacks.begin(
            progress.step, model=state.model, optimizer=state.optimizer, processing_class=self.loop.collector.tokenizer
        )
        self._whole = True
        while progress.step < steps and not (
            self.stop or progress.out_of_patience(patience) or self.callbacks.control.should_training_stop
        ):
            wanted = self._step(tracker, memory if progress.step == 0 else {})
            if self.watched.ending:
                raise TrainingError(self.watched.ending)
            if wanted or (every and progress.step % every == 0 and progress.step < steps):
                self.save()
        self.save()
        self.callbacks.event("on_train_end")
        if self.callbacks.control.should_training_stop:
            tracker.say(f"the run ends at step {progress.step}: a callback asked for it")
        if progress.out_of_patience(patience):
            tracker.say(
                f"the run ends at step {progress.step}: {progress.evaluations_since_best} evaluations in a row were no "
                f"better by {self.config.best_metric} (task.eval_patience)"
            )
        if self.stop:
            tracker.say(f"saved at step {progress.step}; go on with: longgrpo train --resume {self.directory}")
            return None
        return self._finish(tracker)

    def _step(self, tracker: Tracker, also: Mapping[str, Any]) -> bool:
        """One step, whose metrics include `also`, measured before it; returns whether it is to be saved, as its
        evaluation is the best so far or a callback wants it. If it fails before the weights move, all is as before."""
        stream, number, trained = self.loop.collector.stream, self.progress.step + 1, self.loop.state
        state, generators, control = stream.state, random_states(), copy.copy(trained.entropy_control)
        self.callbacks.step_begin()
        self.loop.collector.engine.drop_caches()  # as after a resume, nothing is cached of what was sampled before
        self._whole = trained.moved = False
        try:
            result = step(self.loop, number)
        except BaseException:
            if not trained.moved:
                stream.state, trained.skipped_updates = state, self.progress.skipped_updates
                trained.entropy_control = control
                set_random_states(generators)
                self._whole = True
            raise
        self.progress.step, self.progress.skipped_updates = number, trained.skipped_updates
        drift = result.metrics["engine_trainer_logprob_diff_max"] or 0.0  # None: not finite
        self.progress.logprob_diff_max = max(self.progress.logprob_diff_max, drift)
        self.callbacks.step_end(number, stream.epoch)
        every, evaluated, failed, better = self.config.task.eval_steps, {}, None, False
        if (every and number % every == 0) or self.callbacks.control.should_evaluate:
            try:
                evaluated = self.evaluations.during(self.loop.collector, number, tracker.say)
            except Exception as error:  # the step itself is whole
                failed = error
        self._look_at_clock()
        metrics = {**result.metrics, **also, **evaluated, "seconds/run": self.progress.seconds}
        self.progress.metric = best_metric(self.config.best_metric, metrics)
        if evaluated:
            better = self.config.best_is_evaluated and self.progress.count_evaluation()
            self.callbacks.evaluated(evaluated, self.progress.best_evaluation)
        self.watched.step(metrics, result.rollout)
        self._whole = True
        self.callbacks.log(metrics)
        if failed:
            raise failed
        return better or self.callbacks.control.should_save

    def _save_what_is_whole(self) -> str:
        """Saves the last whole step, if that is the run's state now; says what is saved and how to go on."""
        if self._whole is None:
            return ""  # nothing is trained yet
        go_on, reason = f"go on with: longgrpo train --resume {self.directory}", "the weights have moved on since"
        if self._whole:
            try:
                self.save()
                return f"saved at step {self.progress.step}; {go_on}"
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
        last = next((path.name for path in checkpoint.checkpoints(self.directory)[-1:]), "none")
        return f"not saved ({reason}); the last checkpoint is {last}; {go_on}"

    # ---- built and restored
    def _build(self, config: TrainConfig, directory: Path, force: bool, given: Mapping[str, Any]) -> None:
        """Everything that can be refused is looked at first: the engine is slow to start."""
        config, objects = with_adapter(config_with(config, given)), objects_of(given)
        self.config, self.directory, self.progress = config, directory, Progress()
        self.callbacks = Callbacks(config, directory, given.get("callbacks") or ())
        self._start = time.monotonic()
        check_installed(config.log.to)
        rewards = [load_reward(reward, objects) for reward in config.rewards]
        loss = PolicyLoss(config)
        try:
            model_directory = resolve_model(config.model.path, config.model.quantization)
            context = max_length(config.rollout, model_directory)
        except (OSError, ValueError) as error:
            raise ConfigError(str(error)) from error
        tokenizer = load_tokenizer(model_directory, config.task.chat_template)
        calls = EventLoop()
        talks = make_conversations(config, tokenizer, end_token_ids(model_directory), calls, objects)
        as_tokens = prompts_for(config, tokenizer, context, talks)
        held_out, stream = problems_of(config, as_tokens, objects)
        self.evaluations = Evaluations(config, directory, held_out, rewards[0])
        self.evaluations.check()
        first = stream.peek(config.train.prompts_per_step)
        problems = [*first, *(problem for problems in held_out.values() for problem in problems)]
        prompts = [as_tokens.encode(problem) for problem in problems]
        self._forecast = forecast_run(config, max(map(len, prompts)), force)
        try:
            engine = make_engine(config.rollout, config.model, config.lora)
        except (ValueError, NotImplementedError, ImportError) as error:
            raise ConfigError(str(error)) from error
        probe = Probe(prompts[0], engine, config.rollout, config.model.dtype)
        try:
            state = make_state(config, engine, OffloadEngine() if config.memory.offload else None)
        except (ValueError, NotImplementedError) as error:
            engine.close()
            raise ConfigError(str(error)) from error
        collector = Collector(config, engine, tokenizer, Rewarding(rewards, calls), stream, talks)
        self.loop = Loop(config, collector, state, loss, probe)

    def _restore(self, saved: Path) -> None:
        state = checkpoint.load(saved, self._weights(), self.loop.state.optimizer)
        self.progress = Progress.of(state["progress"])
        self.loop.state.masters.publish()
        self.loop.collector.stream.state = state["stream"]
        self.loop.state.skipped_updates = self.progress.skipped_updates
        if self.loop.state.entropy_control and (kept := state.get("entropy_control")):
            self.loop.state.entropy_control = EntropyControl(**kept)
        self.callbacks.restore(state.get("callbacks", []), self.progress.best_evaluation)
        set_random_states(state["generators"])
        self.loop.collector.engine.weights_changed()
        self.evaluations.forget_after(self.progress.step)

    def _weights(self) -> dict[str, torch.Tensor]:
        """What training changes, by name."""
        reference, moves = self.loop.state.reference, self.config.train.reference_sync_steps > 0
        moved = reference.tensors if reference and moves else {}
        return self.loop.state.parameters | {f"reference.{name}": tensor for name, tensor in moved.items()}

    def save(self) -> Path:
        """Writes a checkpoint of the last whole step."""
        self._look_at_clock()
        self.claim.withdraw_end(self.progress.step)
        state = {
            "progress": asdict(self.progress),
            "stream": self.loop.collector.stream.state,
            "generators": random_states(),
            "callbacks": self.callbacks.kept(),
            "entropy_control": (control := self.loop.state.entropy_control) and asdict(control),
        }
        saved = checkpoint.save(
            self.directory,
            self.progress.step,
            self._weights(),
            self.loop.state.optimizer,
            state,
            self._save_adapter if self.config.lora else None,
            self.config.train.keep_checkpoints,
            self.progress.metric,
        )
        self.callbacks.event("on_save")
        return saved

    def _save_adapter(self, directory: Path) -> None:
        save_adapter(self.loop.state.model, directory, published_name(self.config.model.path))
        write_card(directory, self.config, self.progress.step)

    # ---- before and after training
    def _look_at_untrained(self, tracker: Tracker) -> None:
        """Evaluates the untrained model, and tests whether it can learn."""
        probe, found = self.config.train.probe_prompts, {}
        if not self.stop:
            found = self.evaluations.before(self.loop.collector, tracker.say)
            if found and self.config.best_is_evaluated:
                best_metric(self.config.best_metric, found)  # raises for one that no evaluation has
        if self.stop or self.progress.untrained_seen:
            return
        if probe:
            spread = spread_of(self.loop, probe, self.directory, tracker.say)
            found["groups_with_spread"] = self.progress.groups_with_spread_before = spread
        if found:
            tracker.measured({"step": 0, **found})
        self.progress.untrained_seen = True

    def _finish(self, tracker: Tracker) -> dict[str, Any]:
        """The trained model beside the run's other files, the last evaluation, and the summary."""
        self.claim.add(names_at_end(self.config))
        weights, own = ("adapter" if self.config.lora else "model"), self.loop.collector
        write = self._save_adapter if self.config.lora else partial(write_model, own.engine.model, own.tokenizer)
        replace_directory(self.directory / weights, write)
        results = self.evaluations.after(self.loop.collector, self.progress.step, tracker.say)
        self._look_at_clock()
        engine = self.loop.collector.engine.name
        summary = summary_of(self.config, self.directory, self.progress, results, self.watched.standing, engine)
        write_card(self.directory / weights, self.config, self.progress.step, summary)
        write_file(self.directory / "summary.json", json.dumps(summary, indent=1) + "\n")
        return summary

    def _look_at_clock(self) -> None:
        self.progress.seconds = time.monotonic() - self._start
        self.progress.peak_rss_bytes = max(self.progress.peak_rss_bytes, peak_memory()["peak_rss_bytes"])
