"""Looking at a model: replies to held-out problems with their scores, and of the base beside the trained model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from longgrpo.errors import ConfigError
from longgrpo.rollout.protocol import seed_for
from longgrpo.run.files import write_file
from longgrpo.tasks.data import Problem, Problems, decode
from longgrpo.tasks.evaluation import Evaluation
from longgrpo.visible import visible

if TYPE_CHECKING:
    from longgrpo.run.trainer import Trainer


def prompts_to_sample(trainer: Trainer, texts: Sequence[str], count: int) -> list[Problem]:
    """The problems of these prompts, sent as the task sends its own; without any the first `count` held-out ones, or
    training ones if none are held out."""
    task, tokenizer = trainer.config.task, trainer.loop.collector.tokenizer
    if not texts:
        return trainer.held_out[:count] or trainer.loop.collector.stream.peek(count)
    rows = [{(task.prompt_column or "prompt"): text, "question": text} for text in texts]
    return list(map(Problems(rows, task, tokenizer.chat_template is not None).__getitem__, range(len(rows))))


def replies_to(trainer: Trainer, problems: Sequence[Problem], temperature: float) -> list[str]:
    """A reply to each problem, of the model as it is: training's requests but for the temperature (0: greedy). The
    seeds depend on the prompt's place only, so that two models are asked alike."""
    collector = trainer.loop.collector
    request = trainer.config.rollout.request(temperature=temperature)
    encoded = [collector.prompts.encode(problem) for problem in problems]
    collector.engine.drop_caches()
    seeds = [seed_for(trainer.config.train.seed, 0, i, 0) for i in range(len(problems))]
    return decode(collector.tokenizer, collector.engine.generate(encoded, request, seeds), request.skip_special_tokens)


def side_by_side(prompts: Sequence[str], columns: Mapping[str, Sequence[str]], width: int | None = None) -> str:
    """A table with a row a prompt and a column a model, as wide as the terminal."""
    table = Table(box=box.SIMPLE_HEAD, show_lines=True, expand=True)
    for name in ("prompt", *columns):
        table.add_column(name, overflow="fold", ratio=1)
    for cells in zip(prompts, *columns.values(), strict=True):
        table.add_row(*(Text(visible(cell)) for cell in cells))  # Text: no markup is read in what others wrote
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip()


def shown(evaluation: Evaluation, count: int) -> Iterable[str]:
    """The first `count` greedy replies with their scores."""
    each = zip(evaluation.questions, evaluation.replies, evaluation.scores, strict=True)
    for question, reply, score in itertools.islice(each, count):
        yield visible(f"  {'right' if score >= 1 else 'wrong'} {score:g}  {_line(question)}\n    -> {_line(reply)}")


def _line(text: str, most: int = 240) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


def save_evaluations(found: Mapping[str, Evaluation], path: Path) -> None:
    """Every reply with its score as JSON, by the name of the held-out set ("" is the first). Raises ConfigError for a
    file that is there and was not written so."""
    if path.exists():
        try:
            known = all(
                set(one) >= {"questions", "replies", "scores"} for one in json.loads(path.read_bytes()).values()
            )
        except (ValueError, AttributeError, TypeError, OSError):
            known = False
        if not known:
            raise ConfigError(f"{path} exists and holds no evaluation: name another file with --output")
    write_file(path, json.dumps({name: asdict(evaluation) for name, evaluation in found.items()}, indent=1) + "\n")
