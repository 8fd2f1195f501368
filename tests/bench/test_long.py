"""`bench/long.py`: a row of each kind, the file that it goes on from, and what is read off the rows."""

import json
import subprocess
import sys

import long
import pytest

from testing import ROOT


def test_a_row_is_measured_once_and_the_plan_stands_beside_it(tmp_path):
    file = tmp_path / "rows.jsonl"
    command = [sys.executable, ROOT / "bench/long.py", "--tokens", "512", "--program", "everything", "--json", file]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    (row,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert "failed" not in row, row
    assert row["base_bytes"] < row["device_bytes"] < row["peak_bytes"]
    assert "planned" in first.stdout
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "planned" not in again.stdout
    assert len(file.read_text().splitlines()) == 1


def test_a_row_that_dies_says_why_and_does_not_stop_the_others(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    long.measure([dict(zip(long.KEY, ("none", "float32", 1, 64, "everything"), strict=True))], file)
    assert "KeyError" in json.loads(file.read_text())["failed"]
    assert "KeyError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("budget", "found"), [(5, "none"), (10, "1,000"), (15, "1,500"), (30, "3,000"), (39, "3,900"), (40, "over 4,000")]
)
def test_the_longest_sequence_lies_between_the_rows(budget, found):
    assert long.longest([(4000, 40), (1000, 10), (2000, 20)], budget) == found


def test_the_full_list_has_each_row_once():
    rows = [long.key_of(case) for case in long.full_list()]
    assert len(rows) == len(set(rows)) == 2 * 2 * 5 * (4 + 2)
