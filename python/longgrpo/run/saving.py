"""The state of a run, in its checkpoints."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from longgrpo.config.run import TrainConfig
from longgrpo.model.load import published_name
from longgrpo.model.lora import save_adapter
from longgrpo.run import checkpoint
from longgrpo.run.callbacks import Callbacks
from longgrpo.run.card import write_card
from longgrpo.run.progress import Progress
from longgrpo.run.shards import Shards
from longgrpo.train.entropy import EntropyControl
from longgrpo.train.generators import random_states, set_random_states
from longgrpo.train.loop import Loop


def shards_of(loop: Loop) -> Shards:
    return Shards(loop.ranks, loop.state.owners)


def weights_of(loop: Loop) -> dict[str, Tensor]:
    """What training changes, by name."""
    reference, moves = loop.state.reference, loop.config.train.reference_sync_steps > 0
    moved = reference.tensors if reference and moves else {}
    return loop.state.parameters | {f"reference.{name}": tensor for name, tensor in moved.items()}


def write_adapter(loop: Loop, directory: Path, step: int) -> None:
    """The adapter as it is after `step` steps, with its card."""
    save_adapter(loop.state.model, directory, published_name(loop.config.model.path))
    write_card(directory, loop.config, step)


def save_run(loop: Loop, config: TrainConfig, directory: Path, progress: Progress, callbacks: Callbacks) -> Path:
    """Writes a checkpoint of the last whole step. All ranks are there when it is written."""
    shards, ranks = shards_of(loop), loop.ranks
    shards.check_alike(loop.state.trained)
    generators = ranks.gather(random_states(), "the random generators")
    control = loop.state.entropy_control
    state: dict[str, Any] = {
        "progress": asdict(progress),
        "stream": loop.collector.stream.state,
        "generators": generators[0],
        **({"rank_generators": generators[1:]} if ranks.world > 1 else {}),
        "callbacks": callbacks.kept(),
        "entropy_control": control and asdict(control),
    }
    saved = checkpoint.save(
        directory,
        progress.step,
        weights_of(loop),
        loop.state.optimizer,
        state,
        (lambda path: write_adapter(loop, path, progress.step)) if config.lora else None,
        config.train.keep_checkpoints,
        progress.metric,
        shards,
    )
    ranks.gather(None, "a checkpoint that is written")
    return saved


def restore_run(loop: Loop, saved: Path, callbacks: Callbacks) -> Progress:
    """Puts the state of a checkpoint, which rank 0 reads, into the run. It may be of another number of ranks: then only
    the global random generators, which the steps do not use, differ from what they were."""
    state = checkpoint.load(saved, weights_of(loop), loop.state.optimizer, shards_of(loop))
    progress = Progress.of(state["progress"])
    loop.state.publish()
    loop.collector.stream.state = state["stream"]
    loop.state.skipped_updates = progress.skipped_updates
    if loop.state.entropy_control and (kept := state.get("entropy_control")):
        loop.state.entropy_control = EntropyControl(**kept)
    callbacks.restore(state.get("callbacks", []), progress.best_evaluation)
    generators = [state["generators"], *state.get("rank_generators", [])]
    if loop.ranks.rank < len(generators):
        set_random_states(generators[loop.ranks.rank])
    loop.collector.engine.weights_changed()
    return progress
