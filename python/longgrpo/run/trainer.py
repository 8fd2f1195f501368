"""A run from its config to its summary: built, evaluated, trained step by step, saved, resumed."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longgrpo.config.run import TrainConfig, load_config
from longgrpo.errors import ConfigError, TrainingError
from longgrpo.run import checkpoint
from longgrpo.run.before import rehearsed, spread_of
from longgrpo.run.building import build
from longgrpo.run.callbacks import Callbacks
from longgrpo.run.card import write_card
from longgrpo.run.claim import Claim, Unclaimed, claim_new, names_at_end, names_of
from longgrpo.run.endings import as_user_error
from longgrpo.run.evaluations import Evaluations
from longgrpo.run.export import write_model
from longgrpo.run.files import replace_directory, write_file
from longgrpo.run.given import config_with
from longgrpo.run.progress import Progress
from longgrpo.run.saving import restore_run, save_run, weights_of, write_adapter
from longgrpo.run.signals import StopRequest
from longgrpo.run.started import write_config
from longgrpo.run.summary import summary_of
from longgrpo.run.tracking import Quiet, Tracker
from longgrpo.run.tuning import tune_run
from longgrpo.run.watching import Watched
from longgrpo.tasks.data import Problem
from longgrpo.tasks.evaluation import Evaluation
from longgrpo.train.generators import random_states, seed_everything, set_random_states
from longgrpo.train.loop import Loop, step
from longgrpo.train.metrics import best_metric, peak_memory
from longgrpo.train.ranks import RankError, join


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
        self.ranks = join(config.train.rank_timeout)
        with self._claiming(lambda: Claim(Path(place)) if place else claim_new(Path("runs"), name)):
            begun, ended = names_of(config)
            if self.claim.holds_run:
                raise ConfigError(
                    f"{place} holds a run already: resume it with `longgrpo train --resume {place}`, or set another "
                    "output_dir"
                )
            self.claim.check([*begun, *ended])
            self._build(config, self.claim.directory, force, given)
            self._begin(begun)

    @classmethod
    def resume(
        cls, directory: Path, overrides: list[str] | None = None, *, force: bool = False, **given: Any
    ) -> Trainer:
        """The run in `directory` at its newest checkpoint, or at its start if it has none yet; overrides such as
        `--train.steps 100` change its config. given: functions, data sets and callbacks as the run was begun with."""
        if not (directory / "config.yaml").is_file():
            raise ConfigError(f"{directory}: holds no run (no config.yaml is in it)")
        trainer = cls.__new__(cls)
        config = load_config(directory / "config.yaml", overrides)
        trainer.ranks = join(config.train.rank_timeout)
        with trainer._claiming(lambda: Claim(directory)):
            begun, ended = names_of(config_with(config, given))
            if "config.yaml" not in trainer.claim.made:
                trainer.claim.adopt(config)
            trainer.claim.check([*begun, *ended])
            saved = trainer.ranks.of_first(lambda: checkpoint.checkpoints(directory), "the checkpoints")
            if saved and trainer.ranks.is_first:
                checkpoint.verify(saved[-1])
            trainer._build(config, directory, force, given)
            if saved:
                trainer.progress = restore_run(trainer.loop, saved[-1], trainer.callbacks)
                if trainer.ranks.is_first:
                    trainer.evaluations.forget_after(trainer.progress.step)
            trainer._begin(begun)
        return trainer

    @contextmanager
    def _claiming(self, claim: Callable[[], Claim]) -> Iterator[None]:
        """Rank 0 has the run's directory, from here on; if what follows fails, on any rank, it is as it was."""
        with self._agreed():
            made = claim() if self.ranks.is_first else None
            try:
                place = self.ranks.broadcast(made.directory if made else Path(), "the run's directory")
                self.claim = made or Unclaimed(place)
                yield
            except BaseException:
                if made:
                    made.undo()
                raise

    def _begin(self, names: list[str]) -> None:
        self.claim.add(names)
        if self.ranks.is_first:
            write_config(self.directory, self.config, self.progress.step)

    def run(self) -> dict[str, Any] | None:
        """Trains up to train.steps and closes the engine. Returns the summary; None if a signal stopped the run:
        it is saved, and `stop.signal` says which signal."""
        try:
            with self._agreed():
                tracker = self._tracker() if self.ranks.is_first else Quiet()
            self.watched = Watched(self.config, tracker)
            self._start = time.monotonic() - self.progress.seconds
            with StopRequest(tracker.say) as self.stop, tracker:
                try:
                    return self._run(tracker)
                except (Exception, SystemExit) as error:
                    self.ranks.agree(error)
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
        checkpoint.load_weights(saved, checkpoint.read_tensors(saved), weights_of(self.loop))
        self.loop.state.publish()
        self.loop.collector.engine.weights_changed()

    @property
    def held_out(self) -> list[Problem]:
        """The problems of the first held-out set."""
        return self.evaluations.sets[""].problems if self.evaluations.sets else []

    def evaluate(self, prefill: str | None = None, name: str = "") -> Evaluation:
        """Replies of the model as it is to the problems of a held-out set, scored alike whenever it is done."""
        return self.evaluations.of(self.loop.collector, name, prefill)

    def _tracker(self) -> Tracker:
        done = self.progress.step if checkpoint.checkpoints(self.directory) else -1  # step 0: the evaluation before
        return Tracker(self.directory, self.config, done)

    def _run(self, tracker: Tracker) -> dict[str, Any] | None:
        progress, steps, every = self.progress, self.config.train.steps, self.config.train.save_steps
        tune_run(self.directory, self.loop.state, self.config.memory.autotune, tracker.say, self.ranks)
        if progress.step == 0:
            self._look_at_untrained(tracker)
            seed_everything(self.config.train.seed + self.ranks.rank)  # whatever was looked at, step 1 begins alike
        memory: dict[str, int] = {}
        if progress.step < steps and self.ranks.is_first:
            (self.directory / "summary.json").unlink(missing_ok=True)  # of an end with fewer steps
        if self._forecast and progress.step < steps and not self._asked_to_stop():
            memory = rehearsed(self._forecast, self.loop, tracker.say)
        state, patience = self.loop.state, self.config.task.eval_patience
        self.callbacks.begin(
            progress.step, model=state.model, optimizer=state.optimizer, processing_class=self.loop.collector.tokenizer
        )
        self._whole = True
        while progress.step < steps and not (self._asked_to_stop() or progress.out_of_patience(patience)):
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
        if self._asked_to_stop() and self.stop:
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
        self.callbacks.agree()
        if (every and number % every == 0) or self.callbacks.control.should_evaluate:
            try:
                evaluated = self.evaluations.during(self.loop.collector, number, tracker.say)
            except Exception as error:  # the step itself is whole
                self.ranks.agree(error)
                failed = error
        self._look_at_clock()
        metrics = {**result.metrics, **also, **evaluated, "seconds/run": self.progress.seconds}
        self.progress.metric = best_metric(self.config.best_metric, metrics)
        if evaluated:
            better = self.config.best_is_evaluated and self.progress.count_evaluation()
            self.callbacks.evaluated(evaluated, self.progress.best_evaluation)
        self.watched.step(metrics, result.rollout)
        self.watched.ending = self.ranks.broadcast(self.watched.ending, "what the watch says")
        self._whole = True
        self.callbacks.log(metrics)
        if failed:
            raise failed
        self.callbacks.agree()
        return better or self.callbacks.control.should_save

    def _save_what_is_whole(self) -> str:
        """Saves the last whole step, if that is the run's state now; says what is saved and how to go on."""
        if self._whole is None:
            return ""  # nothing is trained yet
        go_on, reason = f"go on with: longgrpo train --resume {self.directory}", "the weights have moved on since"
        if self.ranks.lost:
            reason = "a rank is gone"
        elif self._all_whole():
            try:
                self.save()
                return f"saved at step {self.progress.step}; {go_on}"
            except Exception as error:
                self.ranks.agree(error)
                reason = f"{type(error).__name__}: {error}"
        last = next((path.name for path in checkpoint.checkpoints(self.directory)[-1:]), "none")
        return f"not saved ({reason}); the last checkpoint is {last}; {go_on}"

    # ---- built and saved
    def _build(self, config: TrainConfig, directory: Path, force: bool, given: Mapping[str, Any]) -> None:
        self.directory, self.progress = directory, Progress()
        self._start = time.monotonic()
        built = build(config, directory, force, given, self.ranks)
        self.config, self.loop, self._forecast = built.config, built.loop, built.forecast
        self.evaluations, self.callbacks = built.evaluations, built.callbacks
        self.ranks.gather(None, "the start")  # an error of one is one of all before anything is written

    def save(self) -> Path:
        """Writes a checkpoint of the last whole step."""
        self._look_at_clock()
        self.claim.withdraw_end(self.progress.step)
        saved = save_run(self.loop, self.config, self.directory, self.progress, self.callbacks)
        self.callbacks.event("on_save")
        return saved

    # ---- before and after training
    def _look_at_untrained(self, tracker: Tracker) -> None:
        """Evaluates the untrained model, and tests whether it can learn."""
        probe, found = self.config.train.probe_prompts, {}
        if not self._asked_to_stop():
            found = self.evaluations.before(self.loop.collector, tracker.say)
            if found and self.config.best_is_evaluated:
                best_metric(self.config.best_metric, found)  # raises for one that no evaluation has
        if self._asked_to_stop() or self.progress.untrained_seen:
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
        weights = self.directory / ("adapter" if self.config.lora else "model")
        if self.ranks.is_first:
            self._write_trained(weights)
        results = self.evaluations.after(self.loop.collector, self.progress.step, tracker.say)
        self._look_at_clock()
        engine = self.loop.collector.engine.name
        summary = summary_of(self.config, self.directory, self.progress, results, self.watched.standing, engine)
        if self.ranks.is_first:
            write_card(weights, self.config, self.progress.step, summary)
            write_file(self.directory / "summary.json", json.dumps(summary, indent=1) + "\n")
        return self.ranks.broadcast(summary, "the summary")

    def _write_trained(self, weights: Path) -> None:
        if self.config.lora:
            replace_directory(weights, lambda path: write_adapter(self.loop, path, self.progress.step))
        else:
            model, tokenizer = self.loop.collector.engine.model, self.loop.collector.tokenizer
            replace_directory(weights, lambda path: write_model(model, tokenizer, path))

    # ---- what the ranks agree on
    @contextmanager
    def _agreed(self) -> Iterator[None]:
        """An error in here is one of all ranks."""
        try:
            yield
        except Exception as error:
            self.ranks.agree(error)
            raise

    def _asked_to_stop(self) -> bool:
        """Whether a signal has reached any rank, or a callback of any wants to stop."""
        wishes = self.stop.signal, self.callbacks.control.should_training_stop
        signals, stops = zip(*self.ranks.gather(wishes, "whether to go on"), strict=True)
        self.stop.signal = next((number for number in signals if number), None)
        self.callbacks.control.should_training_stop = any(stops)
        return bool(self.stop or any(stops))

    def _all_whole(self) -> bool:
        try:
            return all(self.ranks.gather(self._whole, "whether the last step is whole"))
        except RankError:
            return False

    def _look_at_clock(self) -> None:
        self.progress.seconds = time.monotonic() - self._start
        self.progress.peak_rss_bytes = max(self.progress.peak_rss_bytes, peak_memory()["peak_rss_bytes"])
