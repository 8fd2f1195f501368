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
    """Read back from the canvas alone: a pixel in the run's color where the axes say that the value stands."""
    page = browse(report)
    for i, run in reversed(list(enumerate(two_runs))):  # the later one may lie on the earlier one
        for title, metric in {"Reward": "reward/mean", "Entropy": "entropy"}.items():
            points = [[record["step"], record[metric]] for record in metrics_of(run)[1:]]
            assert page.evaluate(PAINTED, [title, i, points]) == [True] * len(points)
            highest = max(value for _, value in points)
            assert page.evaluate(PAINTED, [title, i, [[2.9, highest * 1.004]]]) == [False]
        page.get_by_role("checkbox", name=run.name).uncheck()
    assert not page.faults


# Whether the canvas of a chart has the color of a run at each (x, y).
PAINTED = """([title, run, points]) => {
  const plot = charts.find((one) => one.data.title === title).drawing;
  const wanted = runColor(run).match(/[0-9a-f]{2}/gi).map((part) => parseInt(part, 16));
  const { canvas } = plot.ctx;
  const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
  copy.drawImage(canvas, 0, 0);
  return points.map(([x, y]) => {
    const at = [plot.valToPos(x, "x", true), plot.valToPos(y, "y", true)].map(Math.round);
    const [r, g, b] = copy.getImageData(...at, 1, 1).data;
    return Math.max(Math.abs(r - wanted[0]), Math.abs(g - wanted[1]), Math.abs(b - wanted[2])) < 60;
  });
}"""


def test_every_logged_number_has_a_place(report, two_runs, browse):
    page = browse(report)
    drawn = {tuple(line[part]) for line in _lines(page) for part in ("values", "low", "high")}
    tables = set(page.locator("#flat tbody th").all_text_contents())
    for run in two_runs:
        for name in read_run(run).names:
            in_a_table = name in tables or name.startswith(("seconds/", "predicted_bytes/", "measured_bytes/"))
            elsewhere = in_a_table or name.endswith(("/std", "_bytes"))  # nowhere; in GiB
            values = tuple(float(f"{r[name]:.9g}") for r in metrics_of(run) if name in r)
            unmeasured = name == "kl" and not any(values)
            assert elsewhere or unmeasured or values in drawn, name


def test_what_was_not_measured_has_no_chart(two_runs, browse, tmp_path):
    """Without loss.beta `kl` is 0 and says nothing."""
    for i, run in enumerate(two_runs):
        write_report([read_run(run)], tmp_path / f"{i}.html")
        page = browse(tmp_path / f"{i}.html")
        assert panel(page, "KL to the reference").count() == i
        assert page.get_by_text("Not measured: KL to the reference").count() == 1 - i


def test_every_metric_is_known_as_the_trainers(two_runs):
    """A reward function may log none of these names."""
    assert [name for run in two_runs for name in read_run(run).names if not is_trainers(name)] == [PAYLOADS[1]]


def _lines(page):
    return page.evaluate("report.charts.flatMap((chart) => chart.lines)")


def test_phases_add_up_to_the_step(report, two_runs, browse):
    page = browse(report)
    rows = page.locator("table.phases tbody tr").all()
    for column, run in enumerate(two_runs):
        shown = [float(row.locator("td").nth(column).text_content().split()[0]) for row in rows]
        steps = [record["seconds/step"] for record in metrics_of(run)[1:]]
        assert sum(shown) == pytest.approx(sum(steps) / len(steps), abs=0.001 * len(shown))


def test_completions_are_ranked(report, two_runs, browse):
    page = browse(report)
    mean = metrics_of(two_runs[0])[-1]["reward/mean"]
    for order, reverse in (("best", True), ("worst", False)):
        page.locator("#completions-order").select_option(order)
        values = [float(total) for total in page.locator("article.completion .total").all_text_contents()]
        assert len(values) > 5
        assert values == sorted(values, reverse=reverse)
        assert (values[0] >= mean) is reverse


def test_runs_stand_side_by_side(report, two_runs, browse):
    page = browse(report)
    differing = page.locator("section").filter(has=page.get_by_role("heading", name="Config")).locator("table").first
    assert {row.split("\t")[0] for row in differing.inner_text().splitlines()[1:]} == {
        "loss.beta", "train.learning_rate", "train.num_iterations",
        "rewards.1.function", "rewards.1.model", "rewards.1.weight", "rewards.1.name",
        "rewards.1.parameters", "rewards.1.timeout", "rewards.1.on_error", "rewards.1.isolate",
        "rewards.1.limits",
    }  # fmt: skip
    drawn = "charts.find((one) => one.data.title === 'Reward').lines.map((line) => line.name)"
    assert page.evaluate(drawn) == ["plain", "with-kl"]
    page.get_by_role("checkbox", name="with-kl").uncheck()
    assert page.evaluate(drawn) == ["plain"]
    rewards = [[record["step"], record["reward/mean"]] for record in metrics_of(two_runs[0])[1:]]
    assert page.evaluate(PAINTED, ["Reward", 0, rewards]) == [True] * 3


def test_a_chart_is_read_with_the_pointer_and_with_the_keys(report, two_runs, browse):
    page = browse(report)
    chart, output = panel(page, "Reward").locator(".plot"), panel(page, "Reward").locator("output")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    left = page.evaluate("charts.find((one) => one.data.title === 'Reward').drawing.valToPos(2, 'x', true)")
    page.mouse.move(box["x"] + left, box["y"] + 40)
    values = [f"{metrics_of(run)[2]['reward/mean']:.4g}" for run in two_runs]
    assert output.text_content() == f"step 2: plain {values[0]}, with-kl {values[1]}"
    chart.focus()
    page.keyboard.press("End")
    assert output.text_content().startswith("step 3: ")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert output.text_content().startswith("step 1: ")


def test_machine_command_commit_and_date_are_shown(report, two_runs, browse):
    page = browse(report)
    rows = page.locator("#run table").first.locator("tbody tr").all_inner_texts()
    assert len(rows) == len(two_runs)
    for row, run in zip(rows, two_runs, strict=True):
        (start,) = read_run(run).starts
        assert start["at"].replace("T", " ").removesuffix("+00:00") in row
        assert all(" ".join(start[name].split()) in " ".join(row.split()) for name in ("machine", "command", "commit"))
    assert "torch" in page.locator("#run table").last.inner_text()


def test_eight_runs_fit_a_phone(two_runs, browse, tmp_path):
    runs = [shutil.copytree(two_runs[i % 2], tmp_path / f"a-run-with-a-long-name-{i}") for i in range(8)]
    cli.main(["report", *map(str, runs), "--output", str(tmp_path / "report.html")])
    page = browse(tmp_path / "report.html", viewport={"width": 360, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator(".run-card").count() == 8
    assert not page.faults


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
    (line,) = [line for line in _lines(page) if line["metric"] == "entropy"]
    first, _, last = (record["entropy"] for record in metrics_of(two_runs[0])[1:])
    assert line["values"] == pytest.approx([first, None, last])
    step = page.evaluate("(charts.find((one) => one.data.title === 'Entropy').drawing.data[1][1])")
    assert step is None  # uPlot's gap
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
    assert row.inner_text().split("\t")[1:4] == ["4.00 GiB", "3.00 GiB", "-25.0 %"]


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
    assert page.locator("article .question").first.text_content() == PAYLOADS[0]
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
    assert page.locator("#flat th").filter(has_text=PAYLOADS[1]).count() == 1  # it is always the same
    assert page.evaluate("[document.scripts.length, window.hit]") == [1, None]


def test_a_charts_title_stays_text(two_runs, browse, tmp_path):
    run = shutil.copytree(two_runs[0], tmp_path / "run")
    records = [record | dict.fromkeys(PAYLOADS, record["step"]) for record in metrics_of(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cli.main(["report", str(run)])
    page = browse(run / "report.html")
    page.locator("#everything > summary").click()
    for payload in PAYLOADS:
        chart = panel(page, payload).locator(".plot")
        assert chart.locator("canvas").count() == 1
        chart.focus()
        page.keyboard.press("ArrowLeft")
        assert panel(page, payload).locator("output").text_content().startswith("step 2: 2")
    assert page.evaluate("[document.scripts.length, window.hit]") == [1, None]
    assert not page.faults


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
        ("report-phone", "dark", 360),
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
  return ["h1", ".quiet", ".about", ".unit", ".verdict h2", ".verdict p", "pre", ".question", ".completion header",
    "td", ".differ td", ".choice label", "button.csv", ".count", ".bar a"]
    .map((selector) => document.querySelector(selector)).map((element) => {
      const style = getComputedStyle(element);
      const ink = rgb(style.color);
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
    whole = {"seconds/step", "seconds/offload_stall", "seconds/run"}
    names = names - phases | {re.sub("/.*", "/PHASE", name) for name in phases - whole} | whole
    assert names <= documented_metrics()
