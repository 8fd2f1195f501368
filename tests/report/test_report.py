"""The report of real runs, in a real browser: what it shows, that it asks for nothing, and that what a model wrote
stays text. The screenshots are left in build/.

The browser is a Chromium of the system (Debian, Ubuntu: apt-get install chromium), or the one that CHROMIUM names.
"""

from __future__ import annotations

import json
import re
import shutil

import pytest

from longgrpo import cli
from longgrpo.config.run import build_config
from longgrpo.errors import DataError
from longgrpo.report import read_run, write_report
from longgrpo.run.trainer import Trainer
from longgrpo.tasks.rewards import is_trainers
from testing import ROOT
from testing.own_rewards import PAYLOADS

BUILD = ROOT / "build"


@pytest.fixture(scope="module")
def report(two_runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    assert cli.main(["report", *map(str, two_runs), "--output", str(path)]) == 0
    return path


def metrics_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def panel(page, title):
    return page.locator("figure").filter(has=page.get_by_text(title, exact=True))


# ---- what it shows


def test_curves_go_through_what_was_measured(report, two_runs, browse):
    """Read back from the drawing alone: where its dots stand between the ticks of its axes."""
    page = browse(report)
    for title, metric in {"Reward": "reward/mean", "Entropy": "entropy", "KL to the reference": "kl"}.items():
        ticks = panel(page, title).locator("text.tick[text-anchor=end]")
        (y0, low), (y1, high) = (
            (float(ticks.nth(i).get_attribute("y")) - 4, float(ticks.nth(i).text_content())) for i in (0, -1)
        )
        for i, run in enumerate(two_runs):
            dots = panel(page, title).locator(f"circle.run-{i}:not(.dashed)").all()  # the panel's first metric
            drawn = [low + (float(dot.get_attribute("cy")) - y0) / (y1 - y0) * (high - low) for dot in dots]
            measured = [record[metric] for record in metrics_of(run)[1:]]
            assert drawn == pytest.approx(measured, abs=(high - low) / 500)
    assert not page.faults


def test_every_logged_number_has_a_place(report, two_runs, browse):
    page = browse(report)
    drawn = {tuple(line[part]) for line in _lines(page) for part in ("values", "low", "high")}
    for run in two_runs:
        for name in read_run(run).names:
            in_a_table = name.startswith(("seconds/", "predicted_bytes/", "measured_bytes/"))
            elsewhere = in_a_table or name.endswith(("/std", "_bytes"))  # nowhere; in GiB
            assert elsewhere or tuple(r[name] for r in metrics_of(run) if name in r) in drawn, name


def test_every_metric_is_known_as_the_trainers(two_runs):
    """A reward function may log none of these names."""
    assert [name for run in two_runs for name in read_run(run).names if not is_trainers(name)] == [PAYLOADS[1]]


def _lines(page):
    charts = page.eval_on_selector_all("[data-chart]", "charts => charts.map(chart => JSON.parse(chart.dataset.chart))")
    return [line for chart in charts for line in chart["lines"]]


def test_phases_add_up_to_the_step(report, two_runs, browse):
    page = browse(report)
    rows = page.locator("table.numbers").first.locator("tbody tr").all()
    for column, run in enumerate(two_runs):
        shown = [float(row.locator("td").nth(column).text_content().split()[0]) for row in rows]
        steps = [record["seconds/step"] for record in metrics_of(run)[1:]]
        assert sum(shown) == pytest.approx(sum(steps) / len(steps), abs=0.001 * len(shown))


def test_completions_are_ranked(report, two_runs, browse):
    page = browse(report)
    totals = page.locator(".of-run-0 details").last.locator(".total").all_text_contents()
    assert len(totals) == 6
    values = [float(total) for total in totals]
    assert values[:3] == sorted(values[:3], reverse=True)
    assert values[3:] == sorted(values[3:])
    mean = metrics_of(two_runs[0])[-1]["reward/mean"]
    assert values[0] >= mean >= values[3]


def test_runs_stand_side_by_side(report, two_runs, browse):
    page = browse(report)
    differing = page.locator("section").filter(has=page.get_by_role("heading", name="Config")).locator("table").first
    assert {row.split("\t")[0] for row in differing.inner_text().splitlines()[1:]} == {
        "loss.beta", "train.learning_rate", "train.num_iterations",
        "rewards.1.function", "rewards.1.model", "rewards.1.weight", "rewards.1.name",
        "rewards.1.parameters", "rewards.1.timeout", "rewards.1.on_error", "rewards.1.isolate",
        "rewards.1.limits",
    }  # fmt: skip
    curve = panel(page, "Reward").locator("path.line.run-1")
    assert curve.is_visible()
    page.get_by_role("checkbox", name="with-kl").uncheck()
    assert not curve.is_visible()
    assert panel(page, "Reward").locator("path.line.run-0").is_visible()


def test_a_chart_is_read_with_the_pointer_and_with_the_keys(report, two_runs, browse):
    page = browse(report)
    chart, output = panel(page, "Reward").locator("svg.chart"), panel(page, "Reward").locator("output")
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + 40)
    values = [f"{metrics_of(run)[2]['reward/mean']:.4g}" for run in two_runs]
    assert output.text_content() == f"step 2: plain {values[0]}, with-kl {values[1]}"
    chart.focus()
    page.keyboard.press("ArrowRight")
    assert output.text_content().startswith("step 3: ")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert output.text_content().startswith("step 1: ")


# ---- a run as it may be found


def test_an_unfinished_run_is_shown(two_runs, browse, tmp_path):
    run = shutil.copytree(two_runs[0], tmp_path / "run")
    (run / "summary.json").unlink()
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 4, "reward/me')  # as a killed process leaves it
    assert cli.main(["report", str(run)]) == 0
    page = browse(run / "report.html")
    assert page.get_by_text("3 of 3, not finished").is_visible()
    assert not page.faults


def test_a_number_that_is_not_finite_is_a_gap(two_runs, browse, tmp_path):
    run = shutil.copytree(two_runs[0], tmp_path / "run")
    records = metrics_of(run)
    records[2] |= {"entropy": float("nan"), "grad_norm": float("inf")}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cli.main(["report", str(run)])
    page = browse(run / "report.html")
    assert panel(page, "Entropy").locator("circle").count() == 2
    assert panel(page, "Entropy").locator("path.line").get_attribute("d").count("M") == 2
    assert not page.faults


def test_predicted_memory_stands_beside_measured(two_runs, browse, tmp_path):
    run = shutil.copytree(two_runs[0], tmp_path / "run")
    records = metrics_of(run)
    assert 0 < records[1]["measured_bytes/training"] <= records[1]["predicted_bytes/training"] * 1.05
    records[1] |= {"predicted_bytes/training": 4 * 2**30, "measured_bytes/training": 3 * 2**30}  # of a larger model
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cli.main(["report", str(run)])
    page = browse(run / "report.html")
    row = page.locator("tr").filter(has=page.get_by_role("rowheader", name="training", exact=True))
    assert row.inner_text().split("\t")[2:] == ["4.00 GiB", "3.00 GiB", "-25.0 %"]


def test_more_runs_than_colors_are_refused(two_runs, tmp_path):
    with pytest.raises(DataError, match="9 runs: a page compares at most 8"):
        write_report([read_run(two_runs[0])] * 9, tmp_path / "report.html")


# ---- what a model wrote stays text


def test_the_payloads_are_live_ones(chromium, tmp_path):
    """Unescaped they run, so that the next test can fail."""
    for payload in PAYLOADS:
        page = chromium.new_page()
        page.set_content(f"<body>{payload}</body>")
        page.wait_for_function("window.hit", timeout=5000)
        page.close()


def test_model_output_stays_text(hostile, browse):
    assert cli.main(["report", str(hostile)]) == 0
    page = browse(hostile / "report.html")
    assert sorted(page.locator("pre").all_text_contents()) == sorted(PAYLOADS)
    assert page.locator(".question").first.text_content() == PAYLOADS[0]
    assert page.evaluate("document.scripts.length") == 1
    assert page.evaluate("document.querySelectorAll('img, iframe, object, details[ontoggle], svg[onload]').length") == 0
    attributes = "[...document.querySelectorAll('*')].flatMap(element => element.getAttributeNames())"
    assert not [name for name in page.evaluate(attributes) if name.startswith("on")]
    assert page.evaluate("window.hit") is None
    assert not page.faults


def test_names_of_rewards_and_metrics_stay_text(report, browse):
    page = browse(report)
    assert panel(page, PAYLOADS[0]).count() == 0  # it never applied
    assert page.locator("td").filter(has_text=PAYLOADS[0]).count() == 2
    assert panel(page, PAYLOADS[1]).count() == 1
    assert page.evaluate("[document.scripts.length, window.hit]") == [1, None]


def test_the_page_runs_no_script_but_its_own(hostile, browse):
    """Whatever got in would meet the content security policy."""
    cli.main(["report", str(hostile)])
    page = browse(hostile / "report.html")
    page.evaluate("payload => document.body.insertAdjacentHTML('beforeend', payload)", "".join(PAYLOADS))
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.hit = 1'}))")
    page.wait_for_timeout(300)
    assert page.evaluate("window.hit") is None
    assert any("Content Security Policy" in fault for fault in page.faults)


def test_unseen_characters_are_shown(hostile, browse, tmp_path):
    from pyarrow import parquet, table

    path = hostile / "completions/step-000001.parquet"
    rows = parquet.read_table(path).to_pylist()
    rows[0]["completion"] = "a\x1b[2Jb\x00c\u202egnp.exe"
    rows[1]["completion"] = "x" * 50_000
    parquet.write_table(table({name: [row[name] for row in rows] for name in rows[0]}), path)
    cli.main(["report", str(hostile)])
    page = browse(hostile / "report.html")
    texts = page.locator("pre").all_text_contents()
    assert "a␛[2Jb␀c⟨U+202E⟩gnp.exe" in texts
    (long,) = [text for text in texts if text.startswith("xxx")]
    assert long.count("x") == 4000
    assert "46,000 characters" in long


# ---- how it looks


def test_light_dark_and_on_a_phone(report, browse):
    BUILD.mkdir(exist_ok=True)
    grounds = {}
    for name, scheme, width in (
        ("report", "light", 1280),
        ("report-dark", "dark", 1280),
        ("report-phone", "dark", 390),
    ):
        page = browse(report, color_scheme=scheme, viewport={"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing hangs over the edge
        for contrast in page.evaluate(CONTRASTS):
            assert contrast >= 4.5  # WCAG AA
        grounds[name] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.screenshot(path=BUILD / f"{name}.png", full_page=True)
        assert not page.faults
    assert grounds["report"] != grounds["report-dark"] == grounds["report-phone"]


# Of every kind of text, against the nearest ground that is painted below it.
CONTRASTS = """() => {
  const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    const color = rgb(getComputedStyle(element).backgroundColor);
    return color.length === 3 || color[3] > 0 ? color : ground(element.parentElement);
  };
  return ["h1", ".quiet", ".about", ".unit", ".tick", "pre", ".question", ".completion header", "td", ".differ td"]
    .map((selector) => document.querySelector(selector)).map((element) => {
      const style = getComputedStyle(element);
      const ink = rgb(element instanceof SVGElement ? style.fill : style.color);
      const [low, high] = [luminance(ink), luminance(ground(element))].sort((a, b) => a - b);
      return (high + 0.05) / (low + 0.05);
    });
}"""


def documented_metrics():
    """The names in the page's table; one that begins with a slash goes on from the name before it."""
    page = (ROOT / "docs/report.md").read_text()
    rows = page.partition("| names | what |")[2].partition("\n\n")[0].splitlines()
    names = []
    for name in re.findall(r"`([^`]+)`", " ".join(row.split("|")[1] for row in rows if row)):
        names.append(names[-1].rpartition("/")[0] + name if name.startswith("/") else name)
    return set(names)


def test_every_metric_stands_on_the_page(tree, tmp_path):
    tree |= {"loss": {"beta": 0.1}, "memory": {"offload": True}}
    Trainer(build_config(tree), tmp_path / "run").run()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    names = {name.replace("reward/digits", "reward/NAME") for line in lines for name in line}
    phases = {name for name in names if re.match("seconds/|predicted_bytes/|measured_bytes/", name)}
    whole = {"seconds/step", "seconds/offload_stall"}
    names = names - phases | {re.sub("/.*", "/PHASE", name) for name in phases - whole} | whole
    assert names <= documented_metrics()
