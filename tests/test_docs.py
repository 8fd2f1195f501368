"""What the README and the docs print runs: Python as printed, but for fragments (py), and shell by RULES."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import extras
import pytest

from longgrpo import cli
from longgrpo.config.run import dump_config, load_config
from longgrpo.errors import ConfigError
from testing import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def blocks(kind):
    return [
        pytest.param(code, id=f"{page.name}: {code.splitlines()[0]}")
        for page in PAGES
        for found, code in FENCE.findall(page.read_text())
        if found == kind
    ]


def test_each_block_is_of_a_known_kind():
    kinds = {kind for page in PAGES for kind, _ in FENCE.findall(page.read_text())}
    assert {"python", "sh"} <= kinds <= {"python", "py", "sh", "yaml", "json", "text"}


@pytest.mark.parametrize("code", blocks("python"))
def test_python(code, tmp_path):
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=tmp_path, timeout=120)


# ---- shell

Command = list[str]
PROGRAMS = {"longgrpo": [sys.executable, "-m", "longgrpo.cli"], "python": [sys.executable]}  # of this environment


def runs(command: Command, status: int = 0) -> None:
    run = subprocess.run(
        [*PROGRAMS[command[0]], *command[1:]], capture_output=True, text=True, timeout=1200, check=False
    )
    assert run.returncode == status, f"{' '.join(command)}\n{run.stdout}{run.stderr}"


def has_a_valid_config(command: Command) -> None:
    """longgrpo takes the arguments, and what they name and override is a valid config."""
    rest, overrides = cli._split_overrides(command[1:])
    options = vars(cli._parser().parse_args(rest))
    named = [options[key] for key in ("config", "resume", "source") if options.get(key)] or options["runs"]
    for source in named:
        load_config(source / "config.yaml" if source.is_dir() else source, overrides)


class Parsed(Exception):
    pass


def takes_its_arguments(command: Command) -> None:
    """Runs a Python program up to the arguments that it has parsed; what it leaves over overrides its config."""

    def parse(parser, args=None, namespace=None):
        raise Parsed(*parse_known(parser, args, namespace))

    parse_known = argparse.ArgumentParser.parse_known_args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        patch.setattr(sys, "argv", command[1:])
        with pytest.raises(Parsed) as parsed:
            runpy.run_path(command[1], run_name="__main__")
    options, overrides = parsed.value.args
    if overrides:
        load_config(options.config, overrides)


def is_a_target(command: Command) -> None:
    subprocess.run(["make", "-n", *command[1:]], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


def has_files(command: Command) -> None:
    """Every path that it names is there."""
    for word in command[1:]:
        assert "/" not in word or (ROOT / word).exists(), word


def is_a_preset(command: Command) -> None:
    presets = json.loads((ROOT / "CMakePresets.json").read_text())
    kind = "buildPresets" if "--build" in command else "configurePresets"
    assert command[-1] in [preset["name"] for preset in presets[kind]]


def has_cmake_options(command: Command) -> None:
    known = "".join(path.read_text() for path in (ROOT / "CMakeLists.txt", *ROOT.glob("third_party/*.cmake")))
    for name in re.findall(r"-D(LONGGRPO_\w+)=", " ".join(command)):
        assert re.search(rf"\b{name}\b", known), name


def has_benchmark_options(command: Command) -> None:
    """It is a benchmark in C++, and its source reads each option."""
    program = next(word for word in command if "bench_" in word)
    source = (ROOT / "bench" / Path(program).name.replace("bench_", "")).with_suffix(".cpp").read_text()
    for option in command[command.index(program) + 1 :]:
        assert not option.startswith("--") or f'"{option}"' in source, option


def is_known(command: Command) -> None:
    """Nothing of it can be tried here."""


def has_extras(command: Command) -> None:
    extras.requirements(*command[2].partition("[")[2].rstrip("]").split(","))


def is_pinned(command: Command) -> None:
    """Each package as `make setup` installs it."""
    pins = "".join((ROOT / f"requirements/{name}.txt").read_text() for name in ("engine-cpu-nodeps", "model"))
    assert set(command[3:]) <= set(pins.splitlines())


class Rule(NamedTuple):
    command: str
    """A pattern of the words, without .venv/bin/."""
    check: Callable[[Command], None]
    """What `make test` does with it, in a directory with examples/ and the config of a run in runs/mine."""
    why: str = ""
    """It does no more. A_MINUTE: `make test-long` runs it as printed."""
    status: int = 0
    """With which it then ends."""


A_MINUTE = "a minute"
RULES = [
    Rule("longgrpo plan * --dry-run *", has_a_valid_config, A_MINUTE),
    Rule("longgrpo plan *", runs),
    Rule("python -m longgrpo.doctor", runs),
    Rule("longgrpo * runs/mine*", has_a_valid_config, A_MINUTE),
    Rule("longgrpo selftest *", has_a_valid_config, A_MINUTE),
    Rule("longgrpo parity *", has_a_valid_config, A_MINUTE, status=1),  # it finds a difference
    Rule("longgrpo train *", has_a_valid_config, "a training run, minutes to days"),
    Rule("python bench/resume.py *", takes_its_arguments, "several training runs"),
    Rule("python bench/*", has_files, "a measurement, minutes to hours"),
    Rule("python scripts/*", has_files, "writes into the source tree; a test of its own compares"),
    Rule("python -m pytest *", has_files, "the tests themselves"),
    Rule("torchrun *", is_known, "a training run on several machines"),
    Rule("pytest *", has_files, "the tests themselves"),
    Rule("make gpu*", is_a_target, "needs a GPU"),
    Rule("make *", is_a_target, "sets up the machine, then trains, tests or measures for minutes to hours"),
    Rule("cmake *--preset *", is_a_preset, "a build; tests/bench makes it"),
    Rule("build/bench/bench/bench_loss *", has_benchmark_options, "a measurement; tests/bench runs it on small shapes"),
    Rule("apt-get install *", is_known, "changes the system"),
    Rule(
        "pip install dist/longgrpo-*.whl", is_known, "needs what make wheel builds; tests/test_wheel.py takes it apart"
    ),
    Rule("pip install dist/longgrpo-*.whl[[]*", has_extras, "installs gigabytes; scripts/newcomer.sh does it"),
    Rule("pip install --no-deps *", is_pinned, "the same"),
    Rule("cmake *", has_cmake_options, "needs a cross compiler"),
    Rule("qemu-aarch64-static *", has_benchmark_options, "needs a cross compiler"),
]


def rule_of(command: Command) -> Rule:
    line = " ".join(command)
    rule = next((rule for rule in RULES if fnmatchcase(line, rule.command)), None)
    assert rule, f"no rule says how to check {line!r}"
    return rule


def commands(block: str) -> list[Command]:
    """The commands of a block, their words as bash expands them: each program only says there how it was called."""
    names = {rule.command.split()[0] for rule in RULES}
    said = "".join(f'{path}{name}() {{ say {name} "$@"; }}\n' for name in names for path in ("", ".venv/bin/"))
    said += "exec 3>&1\nsay() { printf '%s\\t' \"$@\" >&3; echo >&3; }\n"
    bash = shutil.which("bash")
    assert bash, "no bash"
    run = subprocess.run([bash, "-euc", said + block], env={"PATH": ""}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr  # a program that no rule is for is not found
    return [line.removesuffix("\t").split("\t") for line in run.stdout.splitlines()]


def check(block: str) -> None:
    for command in commands(block):
        rule_of(command).check(command)


SHELL = blocks("sh")


@pytest.fixture
def user(tmp_path, monkeypatch):
    """Works in a directory as a user has it."""
    for name in ("examples", "bench"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def mine(user):
    run = Path("runs/mine")
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(load_config("examples/smollm2-sums.yaml")))


@pytest.mark.parametrize("block", SHELL)
def test_shell(block, mine):
    check(block)


@pytest.mark.parametrize(
    "line",
    [
        "curl example.org", "longgrpo fly", "make nothing", "pytest tests/nowhere", "cmake --preset slow",
        "longgrpo train examples/smollm2-sums.yaml --train.stepz 5", "longgrpo eval runs/mine --checkpiont best",
        "python bench/resume.py examples/smollm2-sums.yaml --kills many",
    ],
)  # fmt: skip
def test_a_wrong_command_is_caught(line, mine):
    with pytest.raises((AssertionError, ConfigError, SystemExit, subprocess.CalledProcessError)):
        check(line)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_user_types_what_takes_a_minute(user):
    """Each command once, page after page in one directory: what one has left there the next one finds."""
    every = [command for block in SHELL for command in commands(*block.values)]
    for command in dict.fromkeys(tuple(command) for command in every if rule_of(command).why == A_MINUTE):
        runs(list(command), rule_of(command).status)


WITHIN_THE_TEXT = re.compile(r"`((?:make|cmake|pytest|python (?:bench|scripts)/|longgrpo \w+ examples/[a-z])[^`\n>]*)`")
LINES = {line for page in PAGES for line in WITHIN_THE_TEXT.findall(page.read_text()) if " " in line}
HEADS = {line for line in LINES if line.endswith(" ...")}  # of tables, whose rows are run below


@pytest.mark.parametrize("line", sorted(LINES - HEADS))
def test_a_command_within_the_text(line, user):
    check(line)


# ---- predicted figures

TABLE = re.compile(r"^\| `(longgrpo plan [^`]*)\.\.\.` \|(.*)\n\|[-|]+\n((?:\|.*\n)+)", flags=re.MULTILINE)


def cells(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


def planned_rows():
    """Each row of a table whose head begins with `longgrpo plan ...`: its command, and its figures by their heads."""
    for page in PAGES:
        for command, head, rows in TABLE.findall(page.read_text()):
            for row in rows.splitlines():
                first, *others = cells(row)
                arguments = (command + first.split("`")[1]).split()[1:]
                figures = {name: text for name, text in zip(cells(head), others, strict=True) if name}
                yield pytest.param(arguments, figures, id=f"{page.name}: {first}")


PLANNED = list(planned_rows())


def test_there_are_planned_rows():
    assert {param.id.partition(":")[0] for param in PLANNED} >= {"README.md", "memory.md", "long-context.md"}


@pytest.mark.parametrize(("arguments", "figures"), PLANNED)
def test_a_planned_figure_is_what_the_command_prints(arguments, figures, user, capsys):
    assert cli.main([*arguments, "--json"]) in (0, 1)  # it fits, or it does not
    plan = json.loads(capsys.readouterr().out)
    peaks = {phase: plan[phase]["device_bytes"] for phase in ("rollout", "scoring", "training")}
    peaks["host"] = max(plan[phase]["host_bytes"] for phase in peaks)
    assert figures == {name: f"{peaks[name] / 2**30:.1f}" for name in figures}
