"""What the commands of the command line do. Each takes its options and the config's overrides, and returns the exit
status."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from longgrpo.errors import ConfigError
from longgrpo.run.quiet import Heard, native_output_aside
from longgrpo.visible import visible

if TYPE_CHECKING:
    from longgrpo.config.run import TrainConfig
    from longgrpo.run.trainer import Trainer


def plan(options: argparse.Namespace, overrides: list[str]) -> int:
    from longgrpo.checks.rehearsal import Forecast, as_json
    from longgrpo.config.run import load_config
    from longgrpo.memory.ranks import BANDWIDTH, Layout

    try:
        layout = Layout.of(options.ranks)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    bandwidth = BANDWIDTH if options.bandwidth is None else options.bandwidth
    forecast = Forecast(load_config(options.config, overrides), options.card, options.prompt_length, layout, bandwidth)
    counted = forecast.dry_run() if options.dry_run else {}
    if options.json:
        dry = {"dry_run": {name: as_json(phase) for name, phase in counted.items()}} if counted else {}
        print(json.dumps(forecast.json() | dry, indent=1))
    else:
        print(visible(forecast.text()))
        for name, phase in counted.items():
            print(f"dry run, {name}: {phase.device_bytes / 2**30:.2f} GiB without KV cache and CUDA context")
    return 0 if forecast.fits() else 1


def autotune(options: argparse.Namespace, overrides: list[str]) -> int:
    import torch

    from longgrpo.config.run import load_config
    from longgrpo.loss import autotune
    from longgrpo.memory.shape import model_shape

    config = load_config(options.config, overrides)
    try:
        shape = model_shape(config.model.path)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error
    tuning = autotune(
        hidden_size=shape.hidden, vocab_size=shape.vocabulary, dtype=getattr(torch, config.model.dtype),
        trained=config.lora is None, tokens=options.tokens, any_bits=options.any_bits, cached=not options.any_bits,
    )  # fmt: skip
    print(tuning.table())
    print(tuning.text())
    return 0


def train(options: argparse.Namespace, overrides: list[str]) -> int:
    from longgrpo.config.run import dump_config, load_config

    if (options.config is None) == (options.resume is None):
        raise ConfigError("train takes either a config file or --resume RUN")
    source = options.config or options.resume / "config.yaml"
    config = load_config(source, overrides)
    if options.print_config:
        print(dump_config(config), end="")
        return 0

    if options.ranks not in (None, 1):
        from longgrpo.run.launch import launch, without_ranks

        return launch(options.ranks, without_ranks(options.given))

    from longgrpo.run.trainer import Trainer
    from longgrpo.train.ranks import leave

    try:
        with _native_aside(options):
            if options.resume:
                trainer = Trainer.resume(options.resume, overrides, force=options.force)
            else:
                trainer = Trainer(config, force=options.force, name=options.config.stem)
        summary = trainer.run()
    finally:
        leave()
    if summary is None:
        return 128 + (trainer.stop.signal or 0)
    if trainer.ranks.is_first:
        run = trainer.directory
        print(visible(f"done: {run}; longgrpo report {run} makes its page, longgrpo sample {run} shows its replies"))
    return 0


def report(options: argparse.Namespace, overrides: list[str]) -> int:
    from longgrpo.report import follow, read_run, write_report

    path = options.output or (options.runs[0] if len(options.runs) == 1 else Path()) / "report.html"
    if options.refresh is None:
        write_report([read_run(directory) for directory in options.runs], path)
    else:
        follow(options.runs, path, options.refresh)
    print(visible(str(path)))
    return 0


@contextmanager
def _built(options: argparse.Namespace, config: TrainConfig) -> Iterator[Trainer]:
    """A trainer whose own run is of no interest."""
    from longgrpo.run.trainer import Trainer

    with tempfile.TemporaryDirectory() as directory:
        with _native_aside(options):
            trainer = Trainer(config, Path(directory))
        try:
            yield trainer
        finally:
            trainer.close()


def selftest(options: argparse.Namespace, overrides: list[str]) -> int:
    from longgrpo.checks.selftest import selftest
    from longgrpo.config.run import load_config

    config = load_config(options.config, overrides)
    with _built(options, config) as trainer:
        result = selftest(trainer.loop, config.train.probe_prompts or 1)
    print(visible("\n".join(map(str, result.checks))))
    return 1 if result.failed else 0


def parity(options: argparse.Namespace, overrides: list[str]) -> int:
    from longgrpo.checks.parity import parity
    from longgrpo.config.run import load_config
    from longgrpo.run.trainer import Trainer

    dtype = ["--model.dtype", options.dtype] if options.dtype else []
    config = load_config(options.config, [*overrides, *dtype])
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(config, Path(directory))
        try:
            found = parity(trainer.loop)
        finally:
            trainer.close()
    print(json.dumps(found.json(), indent=1) if options.json else visible(str(found)))
    return 0 if found.equal else 1


def evaluate(options: argparse.Namespace, overrides: list[str]) -> int:
    from longgrpo.config.run import load_config
    from longgrpo.run import checkpoint
    from longgrpo.run.look import save_evaluations, shown

    run = options.source if options.source.is_dir() else None
    config = load_config(options.source / "config.yaml" if run else options.source, overrides)
    saved = checkpoint.find(run, options.checkpoint) if run else None
    with _built(options, config) as trainer:
        if saved:
            trainer.load_weights(saved)
        found = {name: trainer.evaluate(name=name) for name in trainer.evaluations.sets}
    of = saved if saved else f"{config.model.path}, untrained"
    for name, evaluation in found.items():
        print(
            visible(f"accuracy {evaluation.accuracy:.3f} on {len(evaluation.scores)} held-out problems ({name or of})")
        )
        metrics = evaluation.metrics()
        for metric in [name for name in metrics if f"{name}_low" in metrics]:
            low, high = (metrics[f"{metric}_{end}"] for end in ("low", "high"))
            print(f"  {metric:10} {metrics[metric]:.3f}  [{low:.3f}, {high:.3f}]")
        print("\n".join(shown(evaluation, options.show)))
    default = options.source / f"eval-{saved.name}.json" if saved else Path(f"{options.source.stem}-eval.json")
    if found:
        save_evaluations(found, options.output or default)
        print(visible(f"every reply: {options.output or default}"))
    return 0


def sample(options: argparse.Namespace, overrides: list[str]) -> int:
    from longgrpo.config.run import load_config
    from longgrpo.run import checkpoint
    from longgrpo.run.look import prompts_to_sample, replies_to, side_by_side

    saved = checkpoint.find(options.source, options.checkpoint or "last")
    config = load_config(options.source / "config.yaml", overrides)
    with _built(options, config) as trainer:
        problems = prompts_to_sample(trainer, options.prompt, options.n)
        base = replies_to(trainer, problems, options.temperature)
        trainer.load_weights(saved)
        trained = replies_to(trainer, problems, options.temperature)
    questions = [problem.question for problem in problems]
    print(side_by_side(questions, {"base": base, saved.name: trained}))
    return 0


def export(options: argparse.Namespace, overrides: list[str]) -> int:
    from longgrpo.config.run import load_config
    from longgrpo.run.export import default_form, export

    form = options.form or default_form(load_config(options.source / "config.yaml"))
    saved = export(options.source, options.directory, form, options.checkpoint, options.dtype)
    print(visible(f"done: {saved} as {form} in {options.directory}"))
    return 0


def _native_aside(options: argparse.Namespace) -> AbstractContextManager[None]:
    """While an engine is built; only on our own stderr."""
    ours = isinstance(sys.stderr, Heard) and not options.verbose
    return native_output_aside() if ours else nullcontext()
