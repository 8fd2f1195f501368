"""What can be done with the charts, in a real browser: zoom, time, seeds as one curve, CSV."""

from __future__ import annotations

import csv
import json
import math

import pytest
import yaml

from longgrpo import cli

STEPS = 40


def write_seed(directory, seed, steps=STEPS, **config):
    """A run whose metrics are formulas of the step and the seed; a step takes 30 seconds, and one more with seed 1."""
    directory.mkdir(parents=True)
    tree = {"train": {"steps": steps, "seed": seed}, "output_dir": str(directory), **config}
    (directory / "config.yaml").write_text(yaml.safe_dump(tree))
    rows = [
        {
            "step": step,
            "reward/mean": reward(step, seed),
            "entropy": 2.0 - 0.01 * step,
            "seconds/step": 30.0,
            "seconds/run": (30.0 + seed) * step,
        }
        for step in range(1, steps + 1)
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def reward(step, seed):
    return 0.5 + 0.01 * step + (0.2 if seed else -0.1) * math.sin(step)


@pytest.fixture
def seeds(tmp_path, browse):
    """The page of two seeds."""
    runs = [write_seed(tmp_path / f"sums/seed-{seed}", seed) for seed in (0, 1)]
    assert cli.main(["report", *map(str, runs), "--output", str(tmp_path / "page.html")]) == 0
    return browse(tmp_path / "page.html", accept_downloads=True)


def lines(page, title="Reward"):
    return page.evaluate("title => charts.find((one) => one.data.title === title).lines", title)


def ranges(page):
    """The x range of every chart that is drawn."""
    found = page.evaluate("charts.filter((one) => one.drawing).map(({drawing}) => drawing.scales.x)")
    return {(scale["min"], scale["max"]) for scale in found}


def plot(page, title="Reward"):
    return page.locator("figure").filter(has=page.get_by_text(title, exact=True)).locator(".plot")


def x_of(page, value):
    """Where the Reward chart shows it, in the window."""
    plot(page).scroll_into_view_if_needed()
    box = plot(page).bounding_box()
    return box["x"] + page.evaluate("x => charts[0].drawing.valToPos(x, 'x', true)", value), box["y"] + 60


def test_seeds_are_one_curve_with_a_band(seeds):
    (line,) = lines(seeds)
    both = [[reward(step, seed) for seed in (0, 1)] for step in range(1, STEPS + 1)]
    assert line["name"] == "sums"
    assert line["values"] == pytest.approx([sum(pair) / 2 for pair in both])
    assert line["low"] == pytest.approx([min(pair) for pair in both])
    assert line["high"] == pytest.approx([max(pair) for pair in both])
    seeds.get_by_label("seeds as one curve").uncheck()
    assert [line["name"] for line in lines(seeds)] == ["seed-0", "seed-1"]
    seeds.get_by_label("seeds as one curve").check()
    seeds.get_by_role("checkbox", name="seed-1").uncheck()
    (alone,) = lines(seeds)
    assert (alone["name"], alone["low"]) == ("seed-0", [])
    assert not seeds.faults


def test_a_curve_of_seeds_ends_where_the_shortest_does(tmp_path, browse):
    runs = [write_seed(tmp_path / f"sums/seed-{seed}", seed) for seed in (0, 1)]
    metrics = (runs[1] / "metrics.jsonl").read_text().splitlines()
    (runs[1] / "metrics.jsonl").write_text("\n".join(metrics[:25]) + "\n")
    cli.main(["report", *map(str, runs), "--output", str(tmp_path / "page.html")])
    (line,) = lines(browse(tmp_path / "page.html"))
    assert line["steps"] == list(range(1, 26))


def test_another_config_is_another_curve(tmp_path, browse):
    runs = [write_seed(tmp_path / f"seed-{i}", i, loss={"beta": i}) for i in (0, 1)]
    cli.main(["report", *map(str, runs), "--output", str(tmp_path / "page.html")])
    page = browse(tmp_path / "page.html")
    assert len(lines(page)) == 2
    assert page.get_by_label("seeds as one curve").count() == 0


def test_time_is_an_axis(seeds):
    seeds.get_by_role("toolbar").get_by_text("time, min").click()
    (line,) = lines(seeds)
    assert line["x"] == pytest.approx([30.5 * step / 60 for step in range(1, STEPS + 1)])  # minutes, mean of both
    seeds.get_by_label("seeds as one curve").uncheck()
    assert lines(seeds)[1]["x"][-1] == pytest.approx(31 * STEPS / 60)
    plot(seeds).focus()
    seeds.keyboard.press("Home")
    assert seeds.locator("output").nth(0).text_content().startswith("0.5 min: seed-0 0.4")
    ((first, last),) = ranges(seeds)
    assert (first, last) == (pytest.approx(0.5), pytest.approx(31 * STEPS / 60))


def test_a_drag_zooms_all_charts_and_a_double_click_shows_all(seeds):
    assert ranges(seeds) == {(1, STEPS)}
    (left, y), (right, _) = x_of(seeds, 10.2), x_of(seeds, 19.6)
    seeds.mouse.move(left, y)
    seeds.mouse.down()
    seeds.mouse.move(right, y, steps=4)
    seeds.mouse.up()
    assert ranges(seeds) == {(10, 20)}
    assert [seeds.locator(end).input_value() for end in ("#from", "#to")] == ["10", "20"]
    low, high = seeds.evaluate("(({min, max}) => [min, max])(charts[0].drawing.scales.y)")
    shown = [reward(step, seed) for step in range(10, 21) for seed in (0, 1)]
    assert low <= min(shown)
    assert max(shown) <= high < max(reward(step, 1) for step in range(1, STEPS + 1))
    seeds.mouse.dblclick(left + 20, y)
    assert ranges(seeds) == {(1, STEPS)}
    assert not seeds.faults


def test_keys_and_fields_zoom(seeds):
    plot(seeds).focus()
    seeds.keyboard.press("Home")
    for _ in range(19):
        seeds.keyboard.press("ArrowRight")
    output = seeds.locator("figure output").first
    assert output.text_content().startswith("step 20: ")
    seeds.keyboard.press("+")
    ((low, high),) = ranges(seeds)
    assert high - low == pytest.approx((STEPS - 1) / 2)
    assert (low + high) / 2 == pytest.approx(20)
    seeds.keyboard.press("Escape")
    assert ranges(seeds) == {(1, STEPS)}
    seeds.locator("#from").fill("5")
    seeds.locator("#from").press("Tab")
    seeds.locator("#to").fill("9")
    seeds.locator("#to").press("Tab")
    assert ranges(seeds) == {(5, 9)}
    seeds.get_by_role("button", name="all", exact=True).click()
    assert ranges(seeds) == {(1, STEPS)}


def saved(page, button):
    with page.expect_download() as download:
        button.click()
    with open(download.value.path(), newline="") as file:
        return download.value.suggested_filename, list(csv.DictReader(file))


def test_csv_has_what_is_shown(seeds):
    seeds.locator("#from").fill("38")
    seeds.locator("#from").press("Tab")
    name, rows = saved(seeds, seeds.get_by_role("button", name="CSV of Reward"))
    assert name == "Reward.csv"
    assert [(row["run"], row["step"], row["seconds"]) for row in rows] == [
        ("sums", str(step), f"{30.5 * step:g}") for step in (38, 39, 40)
    ]
    assert float(rows[0]["low"]) == pytest.approx(min(reward(38, 0), reward(38, 1)))
    seeds.get_by_label("seeds as one curve").uncheck()
    seeds.get_by_role("checkbox", name="seed-0").uncheck()
    _, rows = saved(seeds, seeds.locator("#csv-all"))
    assert {row["run"] for row in rows} == {"seed-1"}
    values = {(row["metric"], row["step"]): float(row["value"]) for row in rows}
    assert values["reward/mean", "40"] == pytest.approx(reward(40, 1))
    assert values["entropy", "38"] == pytest.approx(2.0 - 0.38)


def test_a_cell_that_a_spreadsheet_would_compute_is_text(tmp_path, browse):
    run = write_seed(tmp_path / '=1+1,"x"', 0)
    cli.main(["report", str(run)])
    page = browse(run / "report.html", accept_downloads=True)
    _, rows = saved(page, page.get_by_role("button", name="CSV of Reward"))
    assert rows[0]["run"] == '\'=1+1,"x"'


def test_a_long_curve_has_a_running_mean(tmp_path, browse):
    run = write_seed(tmp_path / "run", 1)
    cli.main(["report", str(run)])
    page = browse(run / "report.html")
    means = page.evaluate("charts[0].drawing.data[2]")
    rewards = [reward(step, 1) for step in range(1, STEPS + 1)]
    assert means == pytest.approx([sum(part := rewards[max(0, i - 3) : i + 1]) / len(part) for i in range(STEPS)])
    found = page.evaluate("runningMean([1, null, 2, 6, 7], 2)")
    assert found == [1.0, None, 1.5, 4.0, 6.5]


def test_layers_lie_on_each_other(tmp_path, browse):
    run = write_seed(tmp_path / "run", 0, steps=3)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    parts = {"seconds/roll_out": [10.0, 20.0, 5.0], "seconds/reward": [4.0, 1.0, 9.0]}
    rows = [row | {name: values[i] for name, values in parts.items()} for i, row in enumerate(rows)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cli.main(["report", str(run)])
    data = browse(run / "report.html").evaluate("charts.find((one) => one.data.kind === 'layers').drawing.data")
    assert data[1:] == [[30.0] * 3, [14.0, 21.0, 14.0], [10.0, 20.0, 5.0]]  # other on top, drawn first


def test_a_narrow_window_and_a_dark_one_keep_the_charts(tmp_path, browse):
    run = write_seed(tmp_path / "run", 0)
    cli.main(["report", str(run)])
    page = browse(run / "report.html", viewport={"width": 1200, "height": 800})
    wide = page.evaluate("charts[0].drawing.width")
    page.set_viewport_size({"width": 360, "height": 800})
    page.wait_for_function("wide => charts[0].drawing.width < wide", arg=wide)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    light = page.evaluate("runColor(0)")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("runColor(0)") != light
    assert not page.faults


def test_a_run_that_kept_no_replies_still_has_charts(tmp_path, browse):
    run = write_seed(tmp_path / "run", 0)
    cli.main(["report", str(run)])
    page = browse(run / "report.html")
    assert page.get_by_text("No completions were kept").is_visible()
    assert page.get_by_text("No held-out problems were evaluated").is_visible()
    assert not page.faults
