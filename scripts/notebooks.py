"""Renders a notebook for each recipe, a config in examples/ whose head names a card: python scripts/notebooks.py

Cells with the tag `gpu` need that card; the others run anywhere.
"""

from __future__ import annotations

from pathlib import Path
from string import Template

import nbformat
from nbformat import NotebookNode, v4

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOKS = EXAMPLES / "notebooks"

INTRODUCTION = """\
# $title

Rendered from `examples/$name.yaml` by `python scripts/notebooks.py`.

**Not run on a GPU.** The cells above "On the card" plan the memory and count it in a dry run; they need no GPU and run
in the tests. Those below need the card and the weights, and have not been run yet."""

CONFIG = '''\
import os
from pathlib import Path

import yaml

from longgrpo.config.run import build_config

here = Path.cwd()  # the model's path begins at the root of the source tree
os.chdir(next(folder for folder in (here, *here.parents) if (folder / "examples").is_dir()))

RECIPE = """
$recipe"""
config = build_config(yaml.safe_load(RECIPE))'''

PLANNED = """\
## What it will hold

Predicted, term by term, from the config and the model's `config.json` alone."""

PLAN = """\
from longgrpo.checks.rehearsal import Forecast

forecast = Forecast(config, "$card")
print(forecast.text())"""

COUNTED = "The trainer's own phases, run on storages that are not there and counted; a minute or two."

DRY_RUN = """\
counted = forecast.dry_run()
for planned in (forecast.plan.scoring, forecast.plan.training):
    engine = planned.terms["context"] + planned.terms.get("KV cache", 0)  # what the trainer itself does not hold
    sizes = [size / 2**30 for size in (planned.device_bytes - engine, counted[planned.name].device_bytes)]
    print("{:9}{:6.2f} GiB planned, {:6.2f} counted".format(planned.name, *sizes))"""

ON_THE_CARD = """\
## On the card

$remark:"""

TRAIN = """\
from longgrpo.run.trainer import Trainer

summary = Trainer(config, Path("runs/$name")).run()
summary"""

REPORT = """\
from longgrpo.report import read_run, write_report

write_report([read_run(Path("runs/$name"))], Path("runs/$name/report.html"))"""


def recipes() -> list[str]:
    return sorted(path.stem for path in EXAMPLES.glob("*.yaml") if "--card" in path.read_text())


def render(name: str) -> str:
    """The notebook of examples/NAME.yaml, whose head is four lines: a title, its plan, a remark, the download."""
    *head, recipe = (EXAMPLES / f"{name}.yaml").read_text().split("\n", 4)
    title, plan, remark, download = (line.removeprefix("#").strip().rstrip(":") for line in head)
    values = {"name": name, "title": title, "card": plan.split("--card ")[1], "remark": remark, "recipe": recipe}

    def text(source: str) -> NotebookNode:
        return v4.new_markdown_cell(Template(source).substitute(values))

    def code(source: str, *tags: str) -> NotebookNode:
        return v4.new_code_cell(Template(source).substitute(values), metadata={"tags": list(tags)} if tags else {})

    cells = [
        *(text(INTRODUCTION), code(CONFIG)),
        *(text(PLANNED), code(PLAN)),
        *(text(COUNTED), code(DRY_RUN)),
        *(text(ON_THE_CARD), code(f"!{download}", "gpu"), code(TRAIN, "gpu"), code(REPORT, "gpu")),
    ]
    for number, cell in enumerate(cells):
        cell.id = f"{cell.cell_type}-{number}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return str(nbformat.writes(v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}))) + "\n"


if __name__ == "__main__":
    for name in recipes():
        (NOTEBOOKS / f"{name}.ipynb").write_text(render(name))
