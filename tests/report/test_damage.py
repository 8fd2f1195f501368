"""A run's files as they may be found: each ends in a page, or in a message that names the file."""

from __future__ import annotations

import json
import shutil

import pytest

from longgrpo import cli
from longgrpo.errors import DataError
from longgrpo.report import read_run


def metrics_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: (run / "config.yaml").unlink(), "holds no run"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1'), "has no step yet"),
        (lambda run: (run / "metrics.jsonl").write_text('{"loss": 1}\n'), r"metrics\.jsonl:1: is not a step's"),
        (
            lambda run: (run / "completions/step-000002.parquet").write_bytes(b"PAR1"),
            r"000002\.parquet: cannot be",
        ),
    ],
)
def test_what_cannot_be_read_is_named(two_runs, tmp_path, capsys, break_it, message):
    run = shutil.copytree(two_runs[0], tmp_path / "run")
    break_it(run)
    assert cli.main(["report", str(run)]) == 2
    with pytest.raises(DataError, match=message):
        raise DataError(capsys.readouterr().err)
    assert not (run / "report.html").exists()


def test_a_file_that_is_no_report_is_not_written_over(two_runs, tmp_path, capsys):
    target = tmp_path / "report.html"
    target.write_text("<title>mine</title>")
    assert cli.main(["report", str(two_runs[0]), "--output", str(target)]) == 2
    assert "is no report of longgrpo: name another file" in capsys.readouterr().err
    assert target.read_text() == "<title>mine</title>"
    target.unlink()
    for _ in range(2):  # its own is
        assert cli.main(["report", str(two_runs[0]), "--output", str(target)]) == 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", '{"step": 1, "reward/mean": "high", "seconds/step": "1"}\n'),
        ("metrics.jsonl", '{"step": 1, "reward/mean": 1e999, "loss": 1e308, "seconds/step": -1e308}\n'),
        ("metrics.jsonl", f'{{"step": 1, "reward/mean": {10**400}}}\n'),
        ("metrics.jsonl", '{"step": 1, "reward/mean": 1}\n' + "\0" * 100),
        ("summary.json", ""),
        ("summary.json", "[]"),
        ("summary.json", '{"steps": 3, "seconds": "long", "versions": 5}'),
        ("summary.json", '{"steps": 3, "eval_after": null, "eval_diff_interval": [1]}'),
        ("eval_before.json", ""),
        ("eval_before.json", "[]"),
        ("eval_after.json", '{"questions": ["a"], "replies": ["b"], "scores": [1]}'),
        ("eval_after.json", '{"questions": ["a"], "replies": ["b"], "scores": [NaN]}'),
        ("eval_after.json", '{"questions": 5, "replies": {}, "scores": null}'),
        ("config.yaml", "- 1"),
        ("config.yaml", '# started: {"at": [1], "versions": 3}\nmodel: 1\n'),
        ("config.yaml", '# started: {"step": "<b>"}\nwatch: 5\nrollout: 1\n'),
        ("config.yaml", "train: 5\nrewards: 7\n"),
        ("config.yaml", "rewards: [{weight: .nan}, 3]\n"),
        ("config.yaml", "a: &a [*a]"),
        ("completions/step-000002.parquet", ""),
        ("completions/step-000002.parquet/x", ""),
    ],
)
def test_a_damaged_file_ends_in_a_page_or_a_message(two_runs, tmp_path, capsys, name, content):
    run = shutil.copytree(two_runs[0], tmp_path / "run")
    if name.endswith("/x"):
        (run / name).parent.unlink()
        (run / name).parent.mkdir()
    (run / name).write_text(content)
    status = cli.main(["report", str(run)])
    assert status == 0 or (status == 2 and "run" in capsys.readouterr().err)


def test_a_summary_of_other_steps_is_of_another_end(two_runs, tmp_path):
    run = shutil.copytree(two_runs[0], tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"steps": 2}))
    assert read_run(run).summary is None


def test_what_the_pages_script_shows_is_made_visible_too(two_runs, tmp_path, unpacked):
    run = shutil.copytree(two_runs[0], tmp_path / "run")
    records = [record | {"a\u202eb\x1b": 1.0} for record in metrics_of(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report.html").read_text() + json.dumps(unpacked(run / "report.html"), ensure_ascii=False)
    assert "a⟨U+202E⟩b␛" in page
    assert "\u202e" not in page
    assert "\\u202e" not in page
    assert "\\u001b" not in page
