"""Held-out replies and completions, filtered, searched and turned page by page in a real browser."""

from __future__ import annotations

import csv
import json

import pytest
import yaml
from pyarrow import parquet, table

from longgrpo import cli
from longgrpo.report import completions, page, read_run
from longgrpo.report.completions import completions_of

BEGINNING = "You add numbers.\nAnswer with one.\n"
OUTCOMES = {"both right": 3, "lost": 2, "gained": 30, "both wrong": 5}
GROUPS, SIZE = 3, 4


def write_run(directory, steps=3, long=""):
    """Scores and rewards are formulas, so that each filter has a known answer."""
    (directory / "completions").mkdir(parents=True)
    tree = {"rewards": [{"function": "exact_answer"}, {"function": "x.py:short", "weight": 0.5}]}
    tree |= {"rollout": {"num_generations": SIZE}, "train": {"steps": steps}}
    (directory / "config.yaml").write_text(yaml.safe_dump(tree))
    rows = [{"step": step, "reward/mean": 0.1 * step} for step in range(1, steps + 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in range(1, steps + 1):
        parquet.write_table(table(columns(step, long)), directory / f"completions/step-{step:06d}.parquet")
    names = [name for name, count in OUTCOMES.items() for _ in range(count)]
    for when, right in (("before", ("both right", "lost")), ("after", ("both right", "gained"))):
        evaluation = {
            "questions": [f"{BEGINNING}What is {i} + 1?" for i in range(len(names))],
            "replies": [f"{when} {i + 1} <b>" for i in range(len(names))],
            "scores": [float(name in right) for name in names],
        }
        (directory / f"eval_{when}.json").write_text(json.dumps(evaluation))
    (directory / "summary.json").write_text(json.dumps({"steps": steps}))
    return directory


def columns(step, long):
    every = range(GROUPS * SIZE)
    return {
        "step": [step] * len(every),
        "question": [f"{BEGINNING}question {step} of group {i // SIZE + 1}" for i in every],
        "completion": [f"reply {i} of step {step}{long}" for i in every],
        "finish_reason": ["length" if i == 5 else "stop" for i in every],
        "tokens": [10 + (i * 5) % 12 for i in every],
        "reward/exact_answer": [float(i % 2) for i in every],
        "reward/short": [None if i == 0 else i / 10 for i in every],
        "advantage": [float(-i) for i in every],
    }


def total(i):
    return float(i % 2) + (0.5 * i / 10 if i else 0.0)


@pytest.fixture
def shown(tmp_path, browse):
    run = write_run(tmp_path / "run")
    assert cli.main(["report", str(run)]) == 0
    return browse(run / "report.html", accept_downloads=True)


def count(browsed, root):
    return browsed.locator(f"{root} .count").text_content()


def settled(browsed, root, text):
    """Waits until a list says how many it has."""
    browsed.wait_for_function(
        "([root, text]) => document.querySelector(`${root} .count`).textContent === text", arg=[root, text]
    )


# ---- held-out replies


def test_replies_stand_side_by_side_and_are_filtered(shown):
    assert count(shown, "#replies") == f"1 to 12 of {sum(OUTCOMES.values())}"
    for outcome, of in OUTCOMES.items():
        chip = shown.locator("#outcomes label").filter(has_text=outcome)
        assert chip.locator("span").text_content() == str(of)
        chip.click()
        settled(shown, "#replies", f"1 to {min(of, 12)} of {of}")
        classes = [reply.get_attribute("class") for reply in shown.locator(".pair").first.locator(".two > div").all()]
        before, after = (
            "right" if name else "wrong"
            for name in (outcome in ("both right", "lost"), outcome in ("both right", "gained"))
        )
        assert classes == [before, after]
    first = shown.locator(".pair").first
    assert first.locator(".question").text_content() == "What is 35 + 1?"  # the beginning is told once
    assert first.locator("pre").all_text_contents() == ["before 36 <b>", "after 36 <b>"]
    assert BEGINNING.strip() in shown.locator("#replies .shared").text_content()
    assert not shown.faults


def test_a_search_leaves_what_it_finds_and_marks_it(shown):
    shown.locator("#replies-search").fill("AFTER 3")
    settled(shown, "#replies", "1 to 11 of 11")  # 3, and 30 to 39
    assert set(shown.locator("#replies mark").all_text_contents()) == {"after 3"}
    assert shown.locator("#outcomes label").first.inner_text().split() == ["all", "11"]
    shown.locator("#replies-search").fill("nothing has this")
    settled(shown, "#replies", "none")
    assert shown.locator("#replies .next").is_disabled()


def test_pages_are_turned(shown):
    following, previous = (shown.locator(f"#replies .{name}") for name in ("next", "previous"))
    assert previous.is_disabled()
    seen = []
    while True:
        seen += shown.locator(".pair .question").all_text_contents()
        if following.is_disabled():
            break
        following.click()
    assert seen == [f"What is {i} + 1?" for i in range(sum(OUTCOMES.values()))]
    previous.click()
    assert count(shown, "#replies") == "25 to 36 of 40"


def test_the_filters_are_reached_and_moved_by_keys(shown):
    shown.locator("#outcome-0").focus()
    shown.keyboard.press("ArrowRight")
    settled(shown, "#replies", f"1 to 12 of {OUTCOMES['gained']}")
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.id") == "replies-search"


# ---- completions


def shown_replies(browsed):
    return [int(text.split()[1]) for text in browsed.locator("article.completion pre").all_text_contents()]


def test_every_completion_is_there_by_step_group_and_order(shown):
    every = list(range(GROUPS * SIZE))
    assert shown.locator("#completions-step").input_value() == "3"  # the newest
    assert shown_replies(shown) == sorted(every, key=total, reverse=True)
    shown.locator("#completions-order").select_option("worst")
    settled(shown, "#sampled", "1 to 12 of 12")
    assert shown_replies(shown) == sorted(every, key=total)
    shown.locator("#completions-order").select_option(label="highest short")
    assert shown_replies(shown)[:3] == [11, 10, 9]
    shown.locator("#completions-order").select_option("sampled")
    shown.locator("#completions-group").select_option("2")
    settled(shown, "#sampled", "1 to 4 of 4")
    assert shown_replies(shown) == [4, 5, 6, 7]
    texts = shown.locator("article.completion").nth(1).locator("header").inner_text()
    for part in ("1.25", "exact_answer 1", "short 0.5", "advantage -5", "cut off", "step 3, group 2"):
        assert part in texts
    shown.locator("#completions-step").select_option("all")
    settled(shown, "#sampled", "1 to 12 of 12")  # group 2 of three steps
    shown.locator("#completions-group").select_option("all")
    settled(shown, "#sampled", f"1 to 12 of {3 * len(every)}")
    assert not shown.faults


def test_a_search_goes_through_all_steps(shown):
    shown.locator("#completions-step").select_option("all")
    shown.locator("#completions-search").fill("reply 7 of step 2")
    settled(shown, "#sampled", "1 to 1 of 1")
    assert shown.locator("article.completion mark").text_content() == "reply 7 of step 2"


def test_csv_has_what_the_filters_leave(shown):
    shown.locator("#completions-group").select_option("3")
    settled(shown, "#sampled", "1 to 4 of 4")
    with shown.expect_download() as download:
        shown.locator("#sampled .csv").click()
    with open(download.value.path(), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["group"]) for row in rows] == [("3", "3")] * 4
    assert {float(row["reward"]) for row in rows} == {total(i) for i in range(8, 12)}


def test_the_room_is_kept_and_what_is_left_out_is_said(tmp_path, browse, monkeypatch):
    run = write_run(tmp_path / "run", steps=9)
    whole = completions_of(read_run(run), 10**9)
    assert [one.step for one in whole.steps] == list(range(1, 10))
    room = 4 * max(len(one.text) for one in whole.steps)
    assert [one.step for one in completions_of(read_run(run), room).steps] == [1, 3, 5, 9]
    assert [one.step for one in completions_of(read_run(run), 0).steps] == [9]  # never none

    monkeypatch.setattr(page, "ROOM", 1200)
    cli.main(["report", str(run)])
    browsed = browse(run / "report.html")
    assert browsed.get_by_text("because replies and completions take at most").is_visible()
    assert "; only the first 20 of 40 problems are on this page" in count(browsed, "#replies")
    taken = browsed.evaluate(
        "[...document.querySelectorAll('template.pair, template.step')].map((one) => one.innerHTML.length)"
    )
    assert sum(taken) < 1200 + len(whole.steps[-1].text)


def test_a_file_is_packed_again_only_if_it_has_changed(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    read = []
    original = completions._read_table
    monkeypatch.setattr(completions, "_read_table", lambda path: read.append(path) or original(path))
    for _ in range(2):
        completions_of(read_run(run), 10**9)
    assert len(read) == 3
    parquet.write_table(table(columns(2, " again")), run / "completions/step-000002.parquet")
    completions_of(read_run(run), 10**9)
    assert [path.name for path in read[3:]] == ["step-000002.parquet"]
