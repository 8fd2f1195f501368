"""The command line: `longgrpo train CONFIG.yaml [--group.key VALUE ...]`, `longgrpo train --resume RUN`, and the
commands around it, `selftest CONFIG`, `parity CONFIG`, `autotune CONFIG`, `eval CONFIG or RUN`, `sample RUN`,
`export RUN DIRECTORY`, `report RUN [RUN ...]`, `completion SHELL`."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from longgrpo.errors import ConfigError, UserError, root_cause
from longgrpo.run.quiet import Heard, log_to_stderr, native_output_aside
from longgrpo.visible import visible

if TYPE_CHECKING:
    from longgrpo.config.run import TrainConfig
    from longgrpo.run.trainer import Trainer

FORMS = """adapter   a run with lora: the adapter alone, for PEFT and vLLM, beside its base
model     the whole model, under lora merged with the adapter, for transformers and vLLM
gguf      one file of the whole model for llama.cpp and Ollama (bfloat16, or --dtype q8_0)"""
KEYS = "any key of the config can be given: --train.steps 5 --rewards.1.weight 0.5 (docs/config.md)"
STATUS = "exit status: 0 done, 1 the self-test failed, 2 a user error, 128 + n stopped by signal n (the run is saved)"


def main(arguments: list[str] | None = None) -> int:
    if arguments is None:
        sys.stderr = Heard(sys.stderr)
    parser, given = _parser(), sys.argv[1:] if arguments is None else arguments
    rest, overrides = _split_overrides(given)
    options = parser.parse_args(rest)
    options.given, rank = given, int(os.environ.get("RANK", "0"))
    log_to_stderr(options.verbose, rank)
    try:
        if overrides and not options.keys:
            raise ConfigError(
                f"{options.command} has no option {overrides[0]}, and takes no config: see {options.command} --help"
            )
        status: int = options.run(options, overrides)
        sys.stdout.flush()
        return status
    except UserError as error:
        if not _tells(error, rank):
            return 2
        failed = error.__cause__ if isinstance(error.__cause__, ImportError) and error.__cause__.__cause__ else None
        return _say(f"longgrpo: {_import_failed(failed) if failed else error}", 2)
    except ImportError as error:
        if str(error.name).startswith("longgrpo"):
            raise
        return _say(f"longgrpo: {_import_failed(error)}", 2)
    except KeyboardInterrupt:
        return _say("longgrpo: stopped at once; the last checkpoint is kept", 130)
    except BrokenPipeError:  # of `| head`: all is done but for who reads it
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _import_failed(error: ImportError) -> str:
    """What is missing, or what broke an import: the libraries name neither the one nor the other."""
    cause = root_cause(error)
    if isinstance(cause, ModuleNotFoundError) and cause.name:
        return f"{cause.name} is not installed: pip install 'longgrpo[train]'"
    return f"an import failed ({type(cause).__name__}: {cause}): python -m longgrpo.doctor says what is broken"


def _say(message: str, status: int) -> int:
    """Tells why the command ends, if anybody listens; returns the exit status."""
    with suppress(OSError, ValueError):
        print(visible(message), file=sys.stderr, flush=True)
    return status


def _version() -> str:
    try:
        return version("longgrpo")
    except PackageNotFoundError:
        return "of a source tree"


def _tells(error: UserError, rank: int) -> bool:
    """Whether this process is to tell of it: of several ranks one does."""
    if rank == 0:
        return True
    from longgrpo.train.ranks import tells

    return tells(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="longgrpo", description="GRPO for long contexts", epilog="longgrpo COMMAND --help says more of each"
    )
    parser.add_argument("--version", action="version", version=f"longgrpo {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace, list[str]], int], help: str, keys: bool = True, more: str = ""
    ) -> argparse.ArgumentParser:
        """keys: whether it takes keys of the config; more: what its help ends with."""
        added = commands.add_parser(
            name, help=help, description=help, epilog="\n".join(filter(None, [KEYS if keys else "", more])),
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        )  # fmt: skip
        added.add_argument("--verbose", action="store_true", help="show the warnings and logs of other packages too")
        added.set_defaults(run=run, command=name, keys=keys)
        return added

    train = command("train", _train, "train a model by a config, or go on with a run", more=STATUS)
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
    same = command("parity", _parity, "where do engine and trainer part? exit status 1: somewhere")
    same.add_argument("config", type=Path)
    same.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: model.dtype")
    same.add_argument("--json", action="store_true", help="print JSON")
    evaluation = command("eval", _eval, "accuracy on the held-out problems, with 95 %% intervals, and the replies")
    evaluation.add_argument("source", type=Path, help="a config, for its untrained model, or a run's directory")
    evaluation.add_argument("--show", type=int, default=3, metavar="N", help="print N replies of each set; default: 3")
    evaluation.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="for every reply, JSON; default: RUN/eval-STEP.json, or CONFIG-eval.json",
    )
    sample = command("sample", _sample, "replies of the base and of the trained model, side by side")
    sample.add_argument("source", type=Path, metavar="RUN", help="the directory of a run with a checkpoint")
    sample.add_argument("--step", "--checkpoint", dest="checkpoint", metavar="STEP", help="or best; default: the last")
    sample.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="may be repeated; default: held-out ones",
    )
    sample.add_argument("--n", type=int, default=4, help="number of held-out prompts; default: 4")
    sample.add_argument("--temperature", type=float, default=0.0, help="default: 0, the most likely tokens")
    export = command("export", _export, "write a run's weights in a form that others load", False, FORMS)
    export.add_argument("source", type=Path, metavar="RUN")
    export.add_argument("directory", type=Path, help="target directory, or the .gguf file; must not exist")
    export.add_argument(
        "--as",
        choices=["adapter", "model", "gguf"],
        dest="form",
        help="default: adapter, or model if there is none",
    )
    export.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16", "q8_0"],
        help="of a model; default: model.dtype. Of a gguf: bfloat16, the default, or q8_0",
    )  # fmt: skip
    report = command("report", _report, "one HTML page from the files of one or several runs", False)
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the directory of a run, finished or not")
    report.add_argument("--output", type=Path, metavar="FILE", help="default: RUN/report.html; for several report.html")
    report.add_argument(
        "--refresh", type=float, metavar="SECONDS", help="write it again and again until the runs have ended"
    )
    for reader in (evaluation, export):
        reader.add_argument("--checkpoint", default="last", metavar="last|best|STEP", help="of the run; default: last")
    completion = command("completion", _completion, "a shell's script that completes commands, options and keys", False)
    completion.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    completion.epilog = 'bash, in ~/.bashrc: eval "$(longgrpo completion bash)"'
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
        print(visible(f"done: {trainer.directory}/summary.json, {trainer.directory}/metrics.jsonl"))
    return 0


def _report(options: argparse.Namespace, overrides: list[str]) -> int:
    from longgrpo.report import follow, read_run, write_report

    path = options.output or (options.runs[0] if len(options.runs) == 1 else Path()) / "report.html"
    if options.refresh is None:
        write_report([read_run(directory) for directory in options.runs], path)
    else:
        follow(options.runs, path, options.refresh)
    print(path)
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


def _selftest(options: argparse.Namespace, overrides: list[str]) -> int:
    from longgrpo.checks.selftest import selftest
    from longgrpo.config.run import load_config

    config = load_config(options.config, overrides)
    with _built(options, config) as trainer:
        result = selftest(trainer.loop, config.train.probe_prompts or 1)
    print(visible("\n".join(map(str, result.checks))))
    return 1 if result.failed else 0


def _parity(options: argparse.Namespace, overrides: list[str]) -> int:
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


def _eval(options: argparse.Namespace, overrides: list[str]) -> int:
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
        print(f"accuracy {evaluation.accuracy:.3f} on {len(evaluation.scores)} held-out problems ({name or of})")
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


def _sample(options: argparse.Namespace, overrides: list[str]) -> int:
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


def _completion(options: argparse.Namespace, overrides: list[str]) -> int:
    import shtab

    from longgrpo.config.overrides import keys
    from longgrpo.config.run import TrainConfig

    parser = _parser()
    for command in _commands(parser):
        if command.get_default("keys"):
            for key in keys(TrainConfig):
                command.add_argument(f"--{key}", help="of the config")
    print(shtab.complete(parser, options.shell))
    return 0


def _export(options: argparse.Namespace, overrides: list[str]) -> int:
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


def _commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parser of each command."""
    found = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return list(found.choices.values())


def _options_of(parser: argparse.ArgumentParser) -> set[str]:
    """Every option of every command."""
    return {
        option for one in (parser, *_commands(parser)) for action in one._actions for option in action.option_strings
    }


def _split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Takes out `--group.key VALUE`, which argparse would read as a flag and a config file: what no command's is."""
    options = _options_of(_parser())
    rest, overrides = [], []
    remaining = iter(arguments)
    for argument in remaining:
        flag = argument.partition("=")[0]
        if not argument.startswith("--") or flag in options:
            rest.append(argument)
        else:
            overrides += [argument] if "=" in argument else [argument, *itertools.islice(remaining, 1)]
    return rest, overrides


if __name__ == "__main__":
    sys.exit(main())
