"""The command line: `longgrpo train CONFIG.yaml [--group.key VALUE ...]`, `longgrpo train --resume RUN`, and the
commands around it, `selftest CONFIG`, `autotune CONFIG`, `eval CONFIG or RUN`, `export RUN DIRECTORY`,
`report RUN [RUN ...]`."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from longgrpo.errors import ConfigError, UserError
from longgrpo.visible import listening, visible

OPTIONS = (
    "--help", "--resume", "--print-config", "--force", "--checkpoint", "--as", "--dtype", "--output", "--card",
    "--prompt-length", "--dry-run", "--json", "--tokens", "--any-bits", "--ranks",
    "--bandwidth",
)  # fmt: skip
EPILOG = """any key of the config can be overridden: --train.steps 5 --rewards.1.weight 0.5
exit status: 0 done, 1 the self-test failed, 2 a user error, 128 + n stopped by signal n (the run is saved)"""


def main(arguments: list[str] | None = None) -> int:
    if arguments is None:
        sys.stderr = _Heard(sys.stderr)
    given = sys.argv[1:] if arguments is None else arguments
    rest, overrides = _split_overrides(given)
    options = _parser().parse_args(rest)
    options.given = given
    handler, rank = logging.StreamHandler(), int(os.environ.get("RANK", "0"))
    handler.setFormatter(_Shown(f"rank {rank}: %(message)s" if rank else "%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("longgrpo").setLevel(logging.WARNING if rank else logging.INFO)
    try:
        status: int = options.run(options, overrides)
        sys.stdout.flush()
        return status
    except UserError as error:
        return _say(f"longgrpo: {error}", 2) if _tells(error, rank) else 2
    except ModuleNotFoundError as error:
        if str(error.name).startswith("longgrpo"):
            raise
        return _say(f"longgrpo: {error.name} is not installed: pip install 'longgrpo[train]'", 2)
    except KeyboardInterrupt:
        return _say("longgrpo: stopped at once; the last checkpoint is kept", 130)
    except BrokenPipeError:  # of `| head`: all is done but for who reads it
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


class _Heard(io.TextIOBase):
    """stderr, whose reader may go (`| head` has ended, a connection is closed): then it is written to no more, also by
    the libraries that show a bar, and the run goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with listening():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with listening():
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


class _Shown(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _say(message: str, status: int) -> int:
    """Tells why the command ends, if anybody listens; returns the exit status."""
    with suppress(OSError, ValueError):
        print(visible(message), file=sys.stderr, flush=True)
    return status


def _tells(error: UserError, rank: int) -> bool:
    """Whether this process is to tell of it: of several ranks one does."""
    if rank == 0:
        return True
    from longgrpo.train.ranks import tells

    return tells(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="longgrpo", description="GRPO for long contexts")
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Callable[[argparse.Namespace, list[str]], int], help: str) -> argparse.ArgumentParser:
        raw = argparse.RawDescriptionHelpFormatter
        added = commands.add_parser(name, help=help, epilog=EPILOG, formatter_class=raw, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    train = command("train", _train, "train a model")
    train.add_argument("config", nargs="?", type=Path, help="a YAML file; see examples/")
    train.add_argument("--resume", type=Path, metavar="RUN", help="resume the run in this directory")
    train.add_argument(
        "--print-config", action="store_true", help="print the whole config, defaults included, and stop"
    )
    train.add_argument("--ranks", type=int, metavar="N", help="on N GPUs of this machine (docs/ranks.md)")
    train.add_argument("--force", action="store_true", help="train even if the memory does not suffice")
    plan = command("plan", _plan, "predict the memory of a run; exit status 1: it does not fit")
    plan.add_argument("config", type=Path)
    plan.add_argument("--card", help="h100-80, h200-141, rtx4090-24, t4-16 or GiB; default: this machine")
    plan.add_argument("--ranks", default="1", metavar="N", help="of a run on N GPUs; 2x8: on 2 machines with 8 each")
    plan.add_argument("--bandwidth", type=float, help="GB/s between the ranks; default: 25, of PCIe 4.0")
    plan.add_argument("--prompt-length", type=int, help="tokens of the longest prompt")
    plan.add_argument("--dry-run", action="store_true", help="also count it, on a step that runs without storage")
    plan.add_argument("--json", action="store_true", help="print JSON")
    tune = command("autotune", _autotune, "time the tiles of a model's head here, and keep the fastest for its runs")
    tune.add_argument("config", type=Path)
    tune.add_argument("--tokens", type=int, help="of the calls that are timed; default: 8192 on a GPU, 1024 on the CPU")
    tune.add_argument(
        "--any-bits", action="store_true", help="on the CPU: also tiles whose results differ in last bits"
    )
    test = command("selftest", _selftest, "can this run learn? checks one update from outside")
    test.add_argument("config", type=Path)
    evaluation = command("eval", _eval, "accuracy on the held-out problems, with 95 %% intervals")
    evaluation.add_argument("source", type=Path, help="a config, for its untrained model, or a run's directory")
    export = command("export", _export, "write a run's weights for transformers, PEFT or vLLM")
    export.add_argument("source", type=Path, metavar="RUN")
    export.add_argument("directory", type=Path, help="target directory; must not exist")
    export.add_argument("--as", choices=["adapter", "model"], default="model", dest="form")
    export.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of a model; default: model.dtype")
    report = command("report", _report, "one HTML page from the files of one or several runs")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the directory of a run, finished or not")
    report.add_argument("--output", type=Path, metavar="FILE", help="default: RUN/report.html; for several report.html")
    for reader in (evaluation, export):
        reader.add_argument("--checkpoint", default="last", metavar="last|best|STEP", help="of the run; default: last")
    return parser


def _plan(options: argparse.Namespace, overrides: list[str]) -> int:
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
        print(forecast.text())
        for name, phase in counted.items():
            print(f"dry run, {name}: {phase.device_bytes / 2**30:.2f} GiB without KV cache and CUDA context")
    return 0 if forecast.fits() else 1


def _autotune(options: argparse.Namespace, overrides: list[str]) -> int:
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


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
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
        print(visible(f"done: {trainer.directory}/summary.json, {trainer.directory}/metrics.jsonl"))
    return 0


def _report(options: argparse.Namespace, overrides: list[str]) -> int:
    from longgrpo.report import read_run, write_report

    runs = [read_run(directory) for directory in options.runs]
    path = options.output or (options.runs[0] if len(runs) == 1 else Path()) / "report.html"
    write_report(runs, path)
    print(path)
    return 0


def _selftest(options: argparse.Namespace, overrides: list[str]) -> int:
    from longgrpo.checks.selftest import selftest
    from longgrpo.config.run import load_config
    from longgrpo.run.trainer import Trainer

    config = load_config(options.config, overrides)
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(config, Path(directory))
        try:
            result = selftest(trainer.loop, config.train.probe_prompts or 1)
        finally:
            trainer.close()
    print(visible("\n".join(map(str, result.checks))))
    return 1 if result.failed else 0


def _eval(options: argparse.Namespace, overrides: list[str]) -> int:
    from longgrpo.config.run import load_config
    from longgrpo.run import checkpoint
    from longgrpo.run.trainer import Trainer

    run = options.source if options.source.is_dir() else None
    config = load_config(options.source / "config.yaml" if run else options.source, overrides)
    saved = checkpoint.find(run, options.checkpoint) if run else None
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(config, Path(directory))
        try:
            if saved:
                trainer.load_weights(saved)
            found = {name: trainer.evaluate(name=name) for name in trainer.evaluations.sets}
        finally:
            trainer.close()
    of = saved if saved else f"{config.model.path}, untrained"
    for name, evaluation in found.items():
        print(f"accuracy {evaluation.accuracy:.3f} on {len(evaluation.scores)} held-out problems ({name or of})")
        metrics = evaluation.metrics()
        for metric in [name for name in metrics if f"{name}_low" in metrics]:
            low, high = (metrics[f"{metric}_{end}"] for end in ("low", "high"))
            print(f"  {metric:10} {metrics[metric]:.3f}  [{low:.3f}, {high:.3f}]")
    return 0


def _export(options: argparse.Namespace, overrides: list[str]) -> int:
    from longgrpo.run.export import export

    if overrides:
        raise ConfigError(f"export takes no config: what is {' '.join(overrides)}?")
    saved = export(options.source, options.directory, options.form, options.checkpoint, options.dtype)
    print(f"done: {saved} as {options.form} in {options.directory}")
    return 0


def _split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Takes out `--group.key VALUE`, which argparse would read as a flag and a config file."""
    rest, overrides = [], []
    remaining = iter(arguments)
    for argument in remaining:
        flag = argument.partition("=")[0]
        if not argument.startswith("--") or flag in OPTIONS:
            rest.append(argument)
        else:
            overrides += [argument] if "=" in argument else [argument, *itertools.islice(remaining, 1)]
    return rest, overrides


if __name__ == "__main__":
    sys.exit(main())
