"""transformers' TrainerCallbacks: what they see of a run, and how they act on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longgrpo.config.run import TrainConfig
from longgrpo.errors import ConfigError
from longgrpo.tasks.user_code import load_function
from longgrpo.train.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments


class Callbacks:
    """The callbacks of a run. `control` is what they want: should_training_stop, should_save, should_evaluate.

    Events: on_init_end, on_train_begin, on_step_begin, on_step_end, on_evaluate, on_log, on_save, on_train_end. `args`
    is a TrainingArguments with what a run has of it; metrics and logs have transformers' names as well: eval/accuracy
    is also eval_accuracy.
    """

    def __init__(
        self, config: TrainConfig, directory: Path, given: Sequence[TrainerCallback | type], ranks: Ranks = ALONE
    ) -> None:
        from transformers import TrainerControl, TrainerState

        named = [load_function(name, "train.callbacks")() for name in config.train.callbacks]
        self._callbacks: list[Any] = [one() if isinstance(one, type) else one for one in given] + named
        for callback in self._callbacks:
            if not hasattr(callback, "on_step_end"):
                raise ConfigError(f"callbacks: {callback!r} is no transformers.TrainerCallback")
        self._config, self._directory = config, directory
        self._args: TrainingArguments | None = None
        self._objects: dict[str, Any] = {}
        first = ranks.is_first
        self.state = TrainerState(
            max_steps=config.train.steps, global_step=0, is_local_process_zero=first, is_world_process_zero=first
        )
        self.control, self._ranks = TrainerControl(), ranks

    def begin(self, step: int, **objects: Any) -> None:
        """The run goes on after `step` steps. objects: the model and what else an event has with it."""
        if self._callbacks:
            self._args, self._objects = _arguments(self._config, self._directory), objects
        self.state.global_step = step
        self.event("on_init_end")
        self.control.should_training_stop = False
        self.event("on_train_begin")

    def event(self, name: str, **also: Any) -> None:
        for callback in self._callbacks:
            answer = getattr(callback, name)(self._args, self.state, self.control, **self._objects, **also)
            self.control = answer or self.control

    def agree(self) -> None:
        """What a callback of any rank wants, all do."""
        names = ("should_evaluate", "should_save", "should_training_stop")
        wishes = self._ranks.gather([bool(getattr(self.control, name)) for name in names], "what callbacks want")
        for name, wish in zip(names, zip(*wishes, strict=True), strict=True):
            setattr(self.control, name, any(wish))

    def step_begin(self) -> None:
        self.control.should_save = self.control.should_evaluate = self.control.should_log = False
        self.event("on_step_begin")

    def step_end(self, step: int, epoch: float) -> None:
        self.state.global_step, self.state.epoch = step, epoch
        self.event("on_step_end")

    def evaluated(self, metrics: Mapping[str, Any], best: float | None) -> None:
        """best: of the evaluations up to this one."""
        self.event("on_evaluate", metrics=_theirs(metrics))
        self._set_best(best)  # after the event, as transformers does: early stopping compares with it

    def log(self, row: Mapping[str, Any]) -> None:
        logs = _theirs(row)
        self.state.log_history.append(logs)
        self.event("on_log", logs=logs)

    def _set_best(self, best: float | None) -> None:
        """best: train.best_metric, which is the negative of the metric for "-NAME"."""
        lower = (self._config.best_metric or "").startswith("-")
        self.state.best_metric = -best if best is not None and lower else best

    # ---- in a checkpoint
    def kept(self) -> list[Any]:
        """What a resumed run needs of them, as JSON values: the attributes of those that have a state()."""
        from transformers.trainer_callback import ExportableState

        return [one.state()["attributes"] if isinstance(one, ExportableState) else None for one in self._callbacks]

    def restore(self, kept: Sequence[Any], best: float | None) -> None:
        self._set_best(best)
        for callback, attributes in zip(self._callbacks, kept, strict=False):
            for name, value in (attributes or {}).items():
                setattr(callback, name, value)


def _theirs(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics, those of an evaluation under transformers' names as well."""
    evaluated = {name.replace("/", "_"): value for name, value in metrics.items() if name.startswith("eval/")}
    return {**metrics, **evaluated}


def _arguments(config: TrainConfig, directory: Path) -> TrainingArguments:
    """What a run has of transformers' arguments."""
    import torch
    from transformers import TrainingArguments

    train, every = config.train, config.task.eval_steps
    best = config.best_metric or ""
    arguments = TrainingArguments(
        output_dir=str(directory), max_steps=train.steps, learning_rate=train.rate, seed=train.seed,
        weight_decay=train.weight_decay, max_grad_norm=train.max_grad_norm, logging_steps=1, report_to=[],
        save_strategy="steps", save_steps=train.save_steps or train.steps, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    if every:
        # Set afterwards: transformers would ask for checkpoints at each evaluation, which are written here as needed.
        arguments.eval_steps = every
        arguments.eval_strategy = type(arguments.save_strategy)("steps")
        arguments.load_best_model_at_end = True
    if best:
        arguments.metric_for_best_model = best.removeprefix("-").replace("/", "_")
        arguments.greater_is_better = not best.startswith("-")
    return arguments
