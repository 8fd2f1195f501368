"""The command line: what it refuses, what it explains, and what it prints of a model."""

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest

from longgrpo import cli
from longgrpo.config.overrides import keys
from longgrpo.config.run import TrainConfig, build_config
from testing.commands import write_config

CODE = "import sys; sys.modules['yaml'] = None; from longgrpo.cli import main; sys.exit(main(['plan', 'run.yaml']))"
COMMANDS = {"train", "plan", "autotune", "selftest", "eval", "sample", "export", "report", "completion"}


def test_a_missing_dependency_is_named_with_the_remedy():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "longgrpo: yaml is not installed: pip install 'longgrpo[train]'\n"


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"longgrpo {version('longgrpo')}\n"


@pytest.mark.parametrize("command", [["report", "RUN"], ["export", "RUN", "out"], ["completion", "bash"]])
def test_a_key_of_the_config_is_refused_by_a_command_that_takes_none(command, capsys):
    assert cli.main([*command, "--foo.bar", "3"]) == 2
    said = f"longgrpo: {command[0]} has no option --foo.bar, and takes no config: see {command[0]} --help\n"
    assert capsys.readouterr().err == said


def test_each_help_is_the_commands_own():
    helps = {parser.get_default("command"): parser.format_help() for parser in cli._commands(cli._parser())}
    assert set(helps) >= COMMANDS
    for name, text in helps.items():
        assert ("any key of the config can be given" in text) == (name not in ("export", "report", "completion")), name
    assert "the adapter alone, for PEFT and vLLM" in helps["export"]
    assert all("stopped by signal" not in text for name, text in helps.items() if name != "train")


def test_completion_knows_options_and_keys(capsys):
    pytest.importorskip("shtab", reason="no shtab: pip install 'longgrpo[train]'")
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert all(f"--{key}" in script for key in keys(TrainConfig))
    assert "--resume" in script
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_keys_are_those_of_the_config():
    known = set(keys(TrainConfig))
    assert {"train.steps", "loss.beta", "model.path", "lora.rank", "watch.truncated", "output_dir"} <= known
    assert "rewards.function" not in known


@pytest.fixture(scope="module")
def run(base_tree, tmp_path_factory):
    """A run of two steps, as a directory."""
    from longgrpo.run.trainer import Trainer

    directory = tmp_path_factory.mktemp("cli") / "run"
    train = {"steps": 2, "save_steps": 1, "probe_prompts": 0, "learning_rate": 0.1}
    Trainer(build_config(base_tree | {"train": base_tree["train"] | train}), directory).run()
    return directory


def test_eval_shows_replies_and_saves_them(run, capsys):
    assert cli.main(["eval", str(run), "--show", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("    -> ") == 2
    file = run / "eval-step-000002.json"
    assert f"every reply: {file}\n" in out
    saved = json.loads(file.read_text())[""]
    assert saved["replies"] == json.loads((run / "eval_after.json").read_text())["replies"]
    assert cli.main(["eval", str(run), "--checkpoint", "1", "--output", str(run / "config.yaml")]) == 2
    assert "holds no evaluation: name another file with --output" in capsys.readouterr().err


def test_sample_puts_base_and_trained_side_by_side(run, capsys):
    assert cli.main(["sample", str(run), "--step", "1", "--prompt", "3 + 4 =", "--prompt", "[bold]x"]) == 0
    out = capsys.readouterr().out
    head = next(line for line in out.splitlines() if "base" in line)
    assert head.split() == ["prompt", "base", "step-000001"]
    assert "3 + 4 =" in out
    assert "[bold]x" in out
    assert cli.main(["sample", str(run), "--n", "2"]) == 0
    rows = capsys.readouterr().out
    before = json.loads((run / "eval_before.json").read_text())
    after = json.loads((run / "eval_after.json").read_text())
    for reply in (before["replies"][0], after["replies"][0]):
        assert reply.strip()[:8] in rows


@pytest.mark.parametrize(("wanted", "file"), [([], "adapter_model.safetensors"), (["--as", "model"], "config.json")])
def test_an_adapter_is_exported_unless_something_else_is_asked_for(run, tmp_path, capsys, wanted, file):
    assert cli.main(["export", str(run), str(tmp_path / "out"), *wanted]) == 0
    assert (tmp_path / "out" / file).exists()
    assert f"as {wanted[-1] if wanted else 'adapter'} in" in capsys.readouterr().out


def test_a_gguf_that_cannot_be_said_leaves_nothing(run, tmp_path, capsys):
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--as", "gguf"]) == 2
    assert "how this tokenizer splits text" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--as", "model", "--dtype", "q8_0"]) == 2
    assert "a gguf takes bfloat16 and q8_0" in capsys.readouterr().err


STEPS = 12


@pytest.fixture
def screen(base_tree, tmp_path):
    """What stands on a terminal of 80 columns after a run, lines that have scrolled away included."""
    if shutil.which("tmux") is None:
        pytest.skip("no tmux: apt-get install tmux")
    names = ["length_of_the_reply", "closeness_to_the_right_answer"]
    own = tmp_path / "own.py"
    own.write_text(
        "".join(f"def {n}(completions, **_):\n    return [len(c) / 10 for c in completions]\n\n" for n in names)
    )
    tree = base_tree | {"rewards": [{"function": f"{own}:{name}"} for name in names]}
    tree["train"] = tree["train"] | {"steps": STEPS, "probe_prompts": 1}
    config = write_config(tree, tmp_path / "run.yaml")
    command = f"{sys.executable} -m longgrpo.cli train {config} --output_dir {tmp_path / 'run'}; tmux wait-for -S done"
    tmux = ["tmux", "-L", f"longgrpo-{os.getpid()}", "-f", "/dev/null"]
    size = ["-x", "80", "-y", "15"]
    start = [
        *tmux,
        "set-option",
        "-g",
        "history-limit",
        "2000",
        ";",
        "new-session",
        "-d",
        *size,
        f"{command}; sleep 300",
    ]
    subprocess.run(start, check=True, env=os.environ)
    try:
        subprocess.run([*tmux, "wait-for", "done"], check=True, timeout=500)
        captured = subprocess.run([*tmux, "capture-pane", "-p", "-S", "-"], check=True, capture_output=True, text=True)
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)
    return captured.stdout.splitlines()


def test_each_line_of_progress_is_whole_at_80_columns(screen):
    steps = [line for line in screen if line.startswith("step ") and "reward" in line]
    assert [line.split()[1] for line in steps] == [f"{n}/{STEPS}" for n in range(1, STEPS + 1)]
    for line in steps:
        assert line.endswith(" left")
        assert "reward " in line
        assert " s  " in line
        assert "length " in line
        assert len(line) < 80
    before = screen[: screen.index(steps[0])]
    assert len([line for line in before if line]) <= 10, before
    assert any(line.startswith("memory by longgrpo plan: rollout") for line in before)
    assert any(line.startswith("fits: ") for line in before)
    assert any(line.startswith("accuracy before: ") for line in before)
    assert not [line for line in screen if "Warning" in line]
    assert any("accuracy" in line and "->" in line for line in screen[screen.index(steps[-1]) :])
