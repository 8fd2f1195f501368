"""A report that follows a run: written again and again, loaded again by the page, and left alone at the end."""

from __future__ import annotations

import json
import threading
import time

import pytest

from longgrpo import cli
from longgrpo.report import live
from report.test_charts import write_seed


def end(run):
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    (run / "summary.json").write_text(json.dumps({"steps": steps}))


def test_it_is_written_until_the_run_has_ended(tmp_path, monkeypatch):
    run = write_seed(tmp_path / "run", 0, steps=5)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(lines[0])
    pages = []

    def sleep(seconds):
        assert seconds == 3
        pages.append((run / "report.html").read_text())
        (run / "metrics.jsonl").write_text("".join(lines[: len(pages) + 1]))
        if len(pages) == 4:
            end(run)

    monkeypatch.setattr(live.time, "sleep", sleep)
    assert cli.main(["report", str(run), "--refresh", "3"]) == 0
    pages.append((run / "report.html").read_text())
    assert [f"step {i} of 5" in text for i, text in enumerate(pages, 1)] == [True, True, True, True, False]
    assert ['data-refresh="3.0"' in text for text in pages] == [True, True, True, True, False]


def test_it_waits_for_the_first_step_and_refuses_what_is_no_run(tmp_path, monkeypatch, capsys):
    run = write_seed(tmp_path / "run", 0, steps=1)
    metrics = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").unlink()

    def sleep(seconds):
        (run / "metrics.jsonl").write_text(metrics)
        end(run)

    monkeypatch.setattr(live.time, "sleep", sleep)
    assert cli.main(["report", str(run), "--refresh", "3"]) == 0
    assert cli.main(["report", str(tmp_path), "--refresh", "3"]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert cli.main(["report", str(run), "--refresh", "0"]) == 2
    assert "--refresh 0: takes seconds, more than 0" in capsys.readouterr().err


def test_who_stops_it_is_left_a_page_that_stands_still(tmp_path, monkeypatch):
    run = write_seed(tmp_path / "run", 0)

    def stopped(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(live.time, "sleep", stopped)
    assert cli.main(["report", str(run), "--refresh", "5"]) == 0
    assert "data-refresh" not in (run / "report.html").read_text()


@pytest.fixture
def following(tmp_path):
    """A run whose report is written every half second, until the test has ended it."""
    run = write_seed(tmp_path / "run", 0, steps=20)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:10]))
    thread = threading.Thread(target=live.follow, args=([run], run / "report.html", 0.5))
    thread.start()
    while not (run / "report.html").exists():
        time.sleep(0.05)
    yield run, lines
    end(run)
    thread.join()


def test_an_open_page_shows_the_new_steps_as_it_was_left(following, browse):
    run, lines = following
    page = browse(run / "report.html")
    page.get_by_role("toolbar").get_by_text("time, ").click()
    page.locator("#keys > summary").click()
    (run / "metrics.jsonl").write_text("".join(lines))
    page.wait_for_function("() => charts[0]?.lines[0].steps.length === 20 && document.body.dataset.ready")
    page.wait_for_function("() => view.axis === 'time'")
    assert page.locator("#keys").get_attribute("open") is not None
    end(run)
    page.wait_for_function("() => document.body.dataset.ready && !document.body.dataset.refresh")
    assert not [fault for fault in page.faults if not fault.startswith("file:")]
