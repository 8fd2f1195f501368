"""What is tried before step 1, and told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from longgrpo.checks.rehearsal import Forecast
from longgrpo.checks.selftest import selftest
from longgrpo.errors import TrainingError
from longgrpo.memory.cards import GIB
from longgrpo.train.generators import random_states_kept, seed_everything
from longgrpo.train.loop import Loop

Say = Callable[[str], None]

LOW_SPREAD = 0.25


def spread_of(loop: Loop, prompts: int, directory: Path, say: Say) -> float:
    """The share of groups with spread, by the self-test on `prompts` prompts. Raises TrainingError for a run that
    cannot learn, and warns of one that hardly can. directory: the run's."""
    seed_everything(loop.config.train.seed)
    result = selftest(loop, prompts)
    if result.failed:
        reasons = "\n".join(map(str, result.failed))
        raise TrainingError(
            f"the self-test found that this run cannot learn:\n{reasons}\n"
            f"correct it and go on with: longgrpo train --resume {directory} (train.probe_prompts: 0 skips the test)"
        )
    spread = result.groups_with_spread
    say(f"self-test: {len(result.checks)} checks passed; groups with spread before step 1: {spread:.2f}")
    if spread < LOW_SPREAD:
        say(
            f"warning: in {1 - spread:.0%} of the groups all completions earn the same, so they teach nothing; "
            "an easier task, more num_generations, a higher temperature or a graded reward gives more"
        )
    return spread


def rehearsed(forecast: Forecast, loop: Loop, say: Say) -> dict[str, int]:
    """Runs the longest micro-batch and tells each phase's peak; returns the peaks as metrics, in bytes. A run that is
    resumed does so again, and goes on as if it had not been stopped."""
    metrics: dict[str, int] = {}
    told = []
    with random_states_kept():
        peaks = forecast.rehearse(loop)
    for phase, (predicted, measured) in peaks.items():
        told.append(f"{phase} {measured / GIB:.2f}/{predicted / GIB:.2f}")
        metrics |= {f"predicted_bytes/{phase}": predicted, f"measured_bytes/{phase}": measured}
    say(f"measured/predicted: {', '.join(told)} GiB")
    return metrics
