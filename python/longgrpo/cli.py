"""The command line: `longgrpo train CONFIG.yaml [--group.key VALUE ...]`, `longgrpo train --resume RUN`,
`longgrpo report RUN [RUN ...]`."""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from pathlib import Path

from longgrpo.train.errors import ConfigError, UserError

OPTIONS = ("--help", "--resume", "--print-config", "--output")
EPILOG = """any key of the config can be overridden: --train.steps 5 --rewards.1.weight 0.5
exit status: 0 done, 2 something to put right, 128 + n stopped by signal n (then the run is saved)"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="longgrpo", description="GRPO for long contexts")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train",
        help="train a model",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    train.add_argument("config", nargs="?", type=Path, help="a YAML file; see examples/")
    train.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this directory")
    train.add_argument(
        "--print-config", action="store_true", help="print the whole config, defaults included, and stop"
    )
    report = commands.add_parser("report", help="one HTML page of what runs have left on disk", allow_abbrev=False)
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the directory of a run, finished or not")
    report.add_argument("--output", type=Path, metavar="FILE", help="default: RUN/report.html, for several report.html")
    rest, overrides = _split_overrides(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(rest)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("longgrpo").setLevel(logging.INFO)
    try:
        return _report(options) if options.command == "report" else _train(options, overrides)
    except UserError as error:
        print(f"longgrpo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("longgrpo: stopped at once; the last checkpoint stands", file=sys.stderr)
        return 130


def _train(options: argparse.Namespace, overrides: list[str]) -> int:
    from longgrpo.train.config import dump_config, load_config

    if (options.config is None) == (options.resume is None):
        raise ConfigError("train takes a config file, or --resume RUN: one of the two")
    source = options.config or options.resume / "config.yaml"
    config = load_config(source, overrides)
    if options.print_config:
        print(dump_config(config), end="")
        return 0

    from longgrpo.train.trainer import Trainer

    if options.resume:
        trainer = Trainer.resume(options.resume, overrides)
    else:
        directory = Path(config.output_dir) if config.output_dir else _free_directory(Path("runs"), options.config.stem)
        trainer = Trainer(config, directory)
    summary = trainer.run()
    if summary is None:
        return 128 + (trainer.stop.signal or 0)
    print(f"done: {trainer.directory}/summary.json, {trainer.directory}/metrics.jsonl")
    return 0


def _report(options: argparse.Namespace) -> int:
    from longgrpo.report import read_run, write_report

    runs = [read_run(directory) for directory in options.runs]
    path = options.output or (options.runs[0] if len(runs) == 1 else Path()) / "report.html"
    write_report(runs, path)
    print(path)
    return 0


def _split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Takes out `--group.key VALUE`, which argparse would read as a flag and a config file."""
    rest, overrides = [], []
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith("--") or argument in OPTIONS or argument.startswith("--resume="):
            rest.append(argument)
        else:
            overrides += [argument] if "=" in argument else [argument, *itertools.islice(remaining, 1)]
    return rest, overrides


def _free_directory(parent: Path, name: str) -> Path:
    """parent/name, or parent/name-2 and so on: a second run never touches the first."""
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    return next(parent / candidate for candidate in names if not (parent / candidate).exists())


if __name__ == "__main__":
    sys.exit(main())
