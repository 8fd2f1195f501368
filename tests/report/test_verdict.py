"""The verdict on top of a report, from runs whose files say what became of them."""

from __future__ import annotations

import json
import statistics

import pytest
import yaml

from longgrpo.report import read_run
from longgrpo.report.held_out import pairs_of
from longgrpo.report.page import _groups, _title
from longgrpo.report.verdict import Spread, ends_of


def write_run(directory, before, after=None, rewards=(0.0, 1.0), steps=None, watch=True, seed=0, **events):
    """A run with held-out scores before and after, a reward a step, and what the watch has found at a step."""
    directory.mkdir(parents=True)
    config = {"train": {"steps": steps or len(rewards), "seed": seed}, "watch": {"enabled": watch}}
    (directory / "config.yaml").write_text(yaml.safe_dump(config | {"output_dir": str(directory)}))
    rows = [{"step": i, "reward/mean": reward, "seconds/step": 2.0} for i, reward in enumerate(rewards, 1)]
    for name, steps_of in events.items():
        for step, value in steps_of.items():
            rows[step - 1][f"watch/{name}"] = value
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for when, scores in (("before", before), ("after", after)):
        if scores:
            questions = [f"q{i}" for i in range(len(scores))]
            tree = {"questions": questions, "replies": questions, "scores": scores}
            (directory / f"eval_{when}.json").write_text(json.dumps(tree))
    if steps is None:
        (directory / "summary.json").write_text(json.dumps({"steps": len(rewards)}))
    return read_run(directory)


def verdict(*runs):
    (group,) = _groups(runs, [run.name for run in runs], [pairs_of(run) for run in runs])
    return group.verdict


def test_a_gain_beyond_chance_is_learning(tmp_path):
    found = verdict(write_run(tmp_path / "run", [1.0] * 10 + [0.0] * 90, [1.0] * 80 + [0.0] * 20))
    assert (found.tone, found.title) == ("better", "It learned")
    assert "It solves 80.0 % of 100 held-out problems, 10.0 % before training" in found.text
    assert "a difference of +70.0 points, with a 95 % interval of +6" in found.text
    assert found.text.endswith("The watch found nothing that ails it.")


def test_a_loss_beyond_chance_is_no_gain(tmp_path):
    found = verdict(write_run(tmp_path / "run", [1.0] * 80 + [0.0] * 20, [1.0] * 10 + [0.0] * 90))
    assert (found.tone, found.title) == ("worse", "It got worse")
    assert "\u221270.0 points" in found.text


def test_what_chance_explains_is_not_called_learning(tmp_path):
    """One of ten problems gained: with 0.9 ** 10 = 35 % of the resamples without a difference, 0 is in the interval."""
    found = verdict(write_run(tmp_path / "run", [0.0] * 10, [1.0] + [0.0] * 9))
    assert (found.tone, found.title) == ("same", "No gain is shown")
    assert "which contains 0" in found.text


def test_only_a_whole_reward_solves_a_problem(tmp_path):
    assert verdict(write_run(tmp_path / "run", [0.5] * 40, [0.9] * 40)).tone == "same"


def test_without_held_out_problems_it_says_so_and_tells_the_reward(tmp_path):
    found = verdict(write_run(tmp_path / "run", None, rewards=[0.0, 0.2, 0.6, 1.0], watch=False))
    assert (found.tone, found.title) == ("unknown", "Not measured")
    assert "task.eval_n" in found.text
    assert "went from 0.10 ± 0.14 to 0.80 ± 0.28" in found.text
    assert found.text.endswith("The watch was off.")


def test_a_run_under_way_is_compared_by_its_newest_evaluation(tmp_path):
    run = write_run(tmp_path / "run", [0.0] * 30, rewards=[0.0] * 8, steps=20)
    (tmp_path / "run/evaluations").mkdir()
    for step, right in ((4, 5), (8, 20), (12, 30)):  # the last is of a step that the run no longer has
        scores = [1.0] * right + [0.0] * (30 - right)
        questions = [f"q{i}" for i in range(30)]
        tree = {"questions": questions, "replies": questions, "scores": scores}
        (tmp_path / f"run/evaluations/step-{step:06d}.json").write_text(json.dumps(tree))
    found = verdict(run)
    assert found.text.startswith("Not at its end: step 8 of 20. It solves 66.7 % of 30")
    assert pairs_of(run)[0].result.step == 8


def test_an_evaluation_of_an_earlier_end_is_not_this_ones(tmp_path):
    run = write_run(tmp_path / "run", [0.0] * 30, [1.0] * 30, steps=20)
    assert pairs_of(run) == []
    assert verdict(run).title == "Not measured"


def test_the_watch_is_told_in_words(tmp_path):
    scores = [0.0] * 40, [1.0] * 40
    found = verdict(
        write_run(tmp_path / "a", *scores, rewards=[0.0] * 9, truncated={2: 1.0, 7: 0.0}, no_spread={5: 1.0})
    )
    assert found.text.endswith("The watch: at the last step stands no_spread; truncated came and went.")


def test_seeds_are_one_verdict_and_any_other_difference_is_not(tmp_path):
    up, down = ([0.0] * 40, [1.0] * 40), ([0.0] * 40, [0.0] * 40)
    runs = [write_run(tmp_path / f"sums/seed-{seed}", *scores, seed=seed) for seed, scores in enumerate((up, up, down))]
    other = write_run(tmp_path / "other", *up, rewards=(0.0, 0.5, 1.0))
    every = [*runs, other]
    groups = _groups(every, [run.name for run in every], [pairs_of(run) for run in every])
    assert [(group.name, group.runs) for group in groups] == [("sums", [0, 1, 2]), ("other", [3])]
    assert groups[0].verdict.title == "No gain is shown"  # one seed did not learn
    assert "On average over 3 seeds it solves 66.7 %" in groups[0].verdict.text
    assert "above 0 with 2 of 3 seeds" in groups[0].verdict.text
    assert _title(every, groups) == "sums, other"
    assert _title(runs[:1], _groups(runs[:1], ["seed-0"], [[]])) == "sums, seed-0"


@pytest.mark.parametrize(("count", "each"), [(1, 0), (2, 1), (7, 3), (20, 10), (60, 10)])
def test_first_and_last_are_means_over_at_most_ten_steps(tmp_path, count, each):
    rewards = [((i * 7919) % 101) / 100 for i in range(count)]
    ends = ends_of(write_run(tmp_path / "run", None, rewards=rewards), "reward/mean")
    if not each:
        assert ends is None
        return
    assert ends.steps == each
    for found, values in ((ends.first, rewards[:each]), (ends.last, rewards[-each:])):
        assert found.mean == pytest.approx(statistics.fmean(values))
        assert found.deviation == pytest.approx(statistics.stdev(values) if each > 1 else 0.0)


@pytest.mark.parametrize(
    ("mean", "deviation", "text"),
    [
        (0.7333, 0.3601, "0.73 ± 0.36"),
        (0.99, 0.0171, "0.990 ± 0.017"),
        (-0.5, 0.0, "\u22120.5 ± 0"),
        (12345.6, 321.0, "12,346 ± 321"),
        (0.0, 0.0, "0 ± 0"),
        (3e-9, 2e-9, "0.0000000030 ± 0.0000000020"),
    ],
)
def test_a_spread_has_the_digits_that_it_knows(mean, deviation, text):
    assert str(Spread(mean, deviation)) == text


def test_the_clock_is_the_logged_one_or_the_sum_of_the_steps(tmp_path):
    run = write_run(tmp_path / "run", None, rewards=[0.0] * 3)
    assert run.clock == {1: 2.0, 2: 4.0, 3: 6.0}
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    lines = [json.dumps(row | {"seconds/run": 10.0 * row["step"]}) + "\n" for row in rows[:2]]
    (tmp_path / "run/metrics.jsonl").write_text("".join([*lines, json.dumps(rows[2]) + "\n"]))
    assert read_run(tmp_path / "run").clock == {1: 10.0, 2: 20.0, 3: 22.0}
