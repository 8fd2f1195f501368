"""The lines of config.yaml that say when, where and by which command a run was started."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timedelta, timezone

from longgrpo.config.run import build_config, load_config
from longgrpo.run.started import MARK, starts_of, write_config
from longgrpo.run.trainer import Trainer


def test_each_start_is_kept_and_the_config_is_the_last(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/longgrpo", "train", "my run.yaml"])
    write_config(tmp_path, build_config(tree), 0)
    monkeypatch.setattr(sys, "argv", ["/x/longgrpo/cli.py", "train", "--resume", "runs/my\nrun\u202e"])
    tree["train"]["steps"] = 77
    write_config(tmp_path, build_config(tree), 5)
    text = (tmp_path / "config.yaml").read_text()
    first, second = starts_of(text)
    assert (first["step"], first["command"]) == (0, "longgrpo train 'my run.yaml'")
    assert (second["step"], second["command"]) == (5, "longgrpo train --resume 'runs/my\nrun\u202e'")
    assert text.isascii()
    assert text.count("\n" + MARK) == 1
    age = datetime.now(timezone.utc) - datetime.fromisoformat(second["at"])
    assert timedelta(0) <= age < timedelta(minutes=1)
    assert second["versions"]["python"] == sys.version.split()[0]
    assert "cores" in second["machine"]
    assert load_config(tmp_path / "config.yaml").train.steps == 77


def test_the_commit_is_that_of_the_current_directory(tree, tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        run = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return run.stdout.strip()

    def commit():
        write_config(tmp_path, build_config(tree), 0)
        return starts_of((tmp_path / "config.yaml").read_text())[-1]["commit"]

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert commit() == ""
    git("init", "-q")
    (tmp_path / "rewards.py").write_text("1")
    git("add", "rewards.py")
    git("commit", "-qm", "first")
    assert commit() == git("rev-parse", "HEAD")
    (tmp_path / "rewards.py").write_text("2")
    assert commit() == git("rev-parse", "HEAD") + "-dirty"


def test_a_line_that_is_no_start_is_passed_over():
    assert starts_of(f'{MARK}{{"step": 1}}\n{MARK}[1]\n{MARK}{{"step"\n# else\nmodel: 1\n') == [{"step": 1}]


def test_a_resumed_run_has_both_starts_and_a_clock_that_goes_on(tree, tmp_path):
    tree["train"] |= {"steps": 2, "save_steps": 0}
    Trainer(build_config(tree), tmp_path / "run").run()
    Trainer.resume(tmp_path / "run", ["--train.steps", "3"]).run()
    assert [start["step"] for start in starts_of((tmp_path / "run/config.yaml").read_text())] == [0, 2]
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    clock = [row["seconds/run"] for row in rows if row["step"] > 0]
    spent = [row["seconds/step"] for row in rows if row["step"] > 0]
    assert all(after - before >= step for before, after, step in zip([0, *clock[:-1]], clock, spent, strict=True))
