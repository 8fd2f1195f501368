"""What a tool that hangs costs the episodes beside it: a rollout in which one call sleeps for a minute, with a timeout
of a second, against the same rollout without it, in turns.

    python bench/slow_tool.py [--pairs 5] [--prompts 8] [--NAME VALUE of examples/smollm2-calculator.yaml ...]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from longgrpo.config.run import load_config
from longgrpo.run.trainer import Trainer
from longgrpo.tasks.user_code import load_function

CONFIG = Path(__file__).parents[1] / "examples" / "smollm2-calculator.yaml"
TIMEOUT = 1.0


class Hangs:
    """The tool, whose next call hangs once `armed`."""

    def __init__(self, tool: Any) -> None:
        self.tool, self.armed = tool, False

    async def calculator(self, expression: str) -> str:
        """Calculates the sum, the difference or the product of two whole numbers.

        Args:
            expression: such as 12 + 30
        """
        if self.armed:
            self.armed = False
            await asyncio.sleep(60)
        return str(self.tool(expression))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=8)
    options, overrides = parser.parse_known_args()
    fixed = ["--task.eval_n", "0", "--task.eval_sets", "{}", "--task.call_timeout", str(TIMEOUT)]
    config = load_config(CONFIG, [*fixed, *overrides])
    tool = Hangs(load_function(config.task.tools[0], "task.tools"))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(config, Path(scratch) / "run", tools=[tool.calculator])
        try:
            report(measure(trainer, tool, options.pairs, options.prompts))
        finally:
            trainer.close()


def measure(trainer: Trainer, tool: Hangs, pairs: int, prompts: int) -> list[tuple[float, float]]:
    """Seconds until the last episode without a failed call is over: without and with a call that hangs."""
    collector, engine = trainer.loop.collector, trainer.loop.collector.engine
    problems, found = collector.sample_prompts(prompts), []

    def seconds(hangs: bool) -> float:
        engine.drop_caches()
        tool.armed, start, ends = hangs, time.monotonic(), []
        end = collector.conversations.end

        def noted(episode: Any, completion: Any) -> None:
            end(episode, completion)
            ends.append((episode, time.monotonic() - start))

        collector.conversations.end = noted
        try:
            samples = collector.roll_out(problems, 1)
        finally:
            collector.conversations.end = end
        collector.release(samples)
        late = [episode for episode, _ in ends if any(call.failure == "timeout" for call in episode.answered)]
        assert len(late) >= hangs, "no episode has called the tool"
        return max(when for episode, when in ends if episode not in late)

    seconds(False)
    for _ in range(pairs):
        found.append((seconds(False), seconds(True)))
    return found


def report(found: list[tuple[float, float]]) -> None:
    for without, with_it in found:
        print(f"{without:6.2f} s without, {with_it:6.2f} s with a call that hangs: {with_it / without:.3f}")
    print(f"median of the ratios: {statistics.median(b / a for a, b in found):.3f}")


if __name__ == "__main__":
    main()
