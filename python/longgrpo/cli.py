"""The command line: `longgrpo train CONFIG.yaml [--group.key VALUE ...]`, `longgrpo train --resume RUN`, and the
commands around it, `selftest CONFIG`, `parity CONFIG`, `autotune CONFIG`, `eval CONFIG or RUN`, `sample RUN`,
`export RUN DIRECTORY`, `report RUN [RUN ...]`, `completion SHELL`."""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from longgrpo import commands
from longgrpo.errors import ConfigError, UserError, root_cause
from longgrpo.run.quiet import Heard, log_to_stderr
from longgrpo.visible import visible

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
    added_to = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace, list[str]], int], help: str, keys: bool = True, more: str = ""
    ) -> argparse.ArgumentParser:
        """keys: whether it takes keys of the config; more: what its help ends with."""
        added = added_to.add_parser(
            name, help=help, description=help, epilog="\n".join(filter(None, [KEYS if keys else "", more])),
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        )  # fmt: skip
        added.add_argument("--verbose", action="store_true", help="show the warnings and logs of other packages too")
        added.set_defaults(run=run, command=name, keys=keys)
        return added

    train = command("train", commands.train, "train a model by a config, or go on with a run", more=STATUS)
    train.add_argument("config", nargs="?", type=Path, help="a YAML file; see examples/")
    train.add_argument("--resume", type=Path, metavar="RUN", help="resume the run in this directory")
    train.add_argument(
        "--print-config", action="store_true", help="print the whole config, defaults included, and stop"
    )
    train.add_argument("--ranks", type=int, metavar="N", help="on N GPUs of this machine (docs/ranks.md)")
    train.add_argument("--force", action="store_true", help="train even if the memory does not suffice")
    plan = command("plan", commands.plan, "predict the memory of a run; exit status 1: it does not fit")
    plan.add_argument("config", type=Path)
    plan.add_argument("--card", help="h100-80, h200-141, rtx4090-24, t4-16 or GiB; default: this machine")
    plan.add_argument("--ranks", default="1", metavar="N", help="of a run on N GPUs; 2x8: on 2 machines with 8 each")
    plan.add_argument("--bandwidth", type=float, help="GB/s between the ranks; default: 25, of PCIe 4.0")
    plan.add_argument("--prompt-length", type=int, help="tokens of the longest prompt")
    plan.add_argument("--dry-run", action="store_true", help="also count it, on a step that runs without storage")
    plan.add_argument("--json", action="store_true", help="print JSON")
    tune = command("autotune", commands.autotune, "time the tiles of a model's head here; its runs take the fastest")
    tune.add_argument("config", type=Path)
    tune.add_argument("--tokens", type=int, help="of the calls that are timed; default: 8192 on a GPU, 1024 on the CPU")
    tune.add_argument(
        "--any-bits", action="store_true", help="on the CPU: also tiles whose results differ in last bits"
    )
    test = command("selftest", commands.selftest, "can this run learn? checks one update from outside")
    test.add_argument("config", type=Path)
    same = command("parity", commands.parity, "where do engine and trainer part? exit status 1: somewhere")
    same.add_argument("config", type=Path)
    same.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: model.dtype")
    same.add_argument("--json", action="store_true", help="print JSON")
    evaluation = command("eval", commands.evaluate, "held-out accuracy, with 95 %% intervals, and the replies")
    evaluation.add_argument("source", type=Path, help="a config, for its untrained model, or a run's directory")
    evaluation.add_argument("--show", type=int, default=3, metavar="N", help="print N replies of each set; default: 3")
    evaluation.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="for every reply, JSON; default: RUN/eval-STEP.json, or CONFIG-eval.json",
    )
    sample = command("sample", commands.sample, "replies of the base and of the trained model, side by side")
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
    export = command("export", commands.export, "write a run's weights in a form that others load", False, FORMS)
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
    report = command("report", commands.report, "one HTML page from the files of one or several runs", False)
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
