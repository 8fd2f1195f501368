"""The notebooks: those of the recipes are what the recipes say, and what needs no GPU runs."""

from __future__ import annotations

import json
import re

import pytest

from longgrpo import cli
from testing import ROOT, load

nbformat = pytest.importorskip("nbformat", reason="no nbformat: pip install -r requirements/test.txt")

NOTEBOOKS = ROOT / "examples" / "notebooks"
QUICK_START = NOTEBOOKS / "quick-start.ipynb"

notebooks = load(ROOT / "scripts" / "notebooks.py")


def printed(path, folder, keep=lambda cell: True):
    """What the cells of a notebook print when they are run in `folder`, one after the other. Raises where one fails."""
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if keep(cell)]
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return "".join(output.get("text") or output["data"]["text/plain"] for output in outputs)


def test_each_recipe_has_its_notebook():
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == {*notebooks.recipes(), QUICK_START.stem}
    assert len(notebooks.recipes()) >= 5


@pytest.mark.parametrize("name", notebooks.recipes())
def test_a_notebook_is_what_its_recipe_says(name):
    """Where this fails: python scripts/notebooks.py"""
    assert (NOTEBOOKS / f"{name}.ipynb").read_text() == notebooks.render(name)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_output_is_kept(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


def without_gpu(cell):
    return "gpu" not in cell.metadata.get("tags", ())


def test_a_plan_runs_anywhere(capsys, monkeypatch):
    """It prints what the recipe's command prints."""
    monkeypatch.chdir(ROOT)
    assert cli.main(["plan", "examples/qwen2.5-1.5b-5gb.yaml", "--card", "5"]) == 0
    path = NOTEBOOKS / "qwen2.5-1.5b-5gb.ipynb"
    shown = printed(path, NOTEBOOKS, lambda cell: without_gpu(cell) and "dry_run" not in cell.source)
    assert shown == capsys.readouterr().out


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", notebooks.recipes())
def test_a_recipe_runs_up_to_its_card(name):
    shown = printed(NOTEBOOKS / f"{name}.ipynb", NOTEBOOKS, without_gpu)
    assert "\nfits: " in shown
    for phase in ("scoring", "training"):
        ((planned, counted),) = re.findall(rf"{phase} +([\d.]+) GiB planned, +([\d.]+) counted", shown)
        assert float(counted) == pytest.approx(float(planned), rel=0.05)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_quick_start_runs_whole(tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where it puts its run
    shown = printed(QUICK_START, tmp_path)
    (run,) = tmp_path.glob("*/quick-start")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][1:]
    assert [metrics["step"] for metrics in steps] == [1, 2, 3, 4, 5]
    summary = json.loads((run / "summary.json").read_text())
    assert str(("vllm", summary["eval_before"], summary["eval_after"])) in shown
    assert any(f" {round(steps[-1]['reward/brief/mean'], 3)} " in line for line in shown.splitlines())
    assert f"{run}/report.html\n" in shown
    assert (run / "report.html").is_file()
