"""Gives every disease to a tiny model and draws what shows it beside a healthy run, for docs/healthy-run.md:

python scripts/disease_pictures.py [NAME ...]
"""

from __future__ import annotations

import sys
import tempfile
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from longgrpo.report import Run, charts, read_run  # noqa: E402
from testing.diseases import DISEASES, Disease, give  # noqa: E402
from testing.models import write_tiny_llama  # noqa: E402

FOLDER = ROOT / "docs" / "healthy-run"
STYLE = """
text { font: 11px system-ui, sans-serif; fill: #6a6a70; } .title { font-size: 13px; }
path { fill: none; stroke-width: 2; stroke-linejoin: round; } .grid { stroke: #8886; stroke-width: 1; }
.run-0 { stroke: #2a8540; } .run-1 { stroke: #d2480c; } text.run-0 { fill: #2a8540; stroke: none; }
text.run-1 { fill: #d2480c; stroke: none; } .raw { opacity: 0.4; stroke-width: 1; } circle { stroke: none; }
circle.run-0 { fill: #2a8540; } circle.run-1 { fill: #d2480c; } .mark { stroke-width: 1.5; stroke-dasharray: 2 3; }
"""


def main(names: list[str]) -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        model = write_tiny_llama(
            Path(scratch) / "model", intermediate_size=64, initializer_range=0.02, tie_word_embeddings=True
        )
        longest = max(DISEASES[name].changes.get("train", {}).get("steps", 12) for name in names)
        give(Disease({"train": {"steps": longest}, "loss": {"beta": 1e-3}}), model, Path(scratch) / "healthy")
        healthy = read_run(Path(scratch) / "healthy")
        for name in names:
            give(DISEASES[name], model, Path(scratch) / name)
            (FOLDER / f"{name}.svg").write_text(drawn(name, healthy, read_run(Path(scratch) / name)))


def drawn(name: str, healthy: Run, diseased: Run) -> str:
    """The disease's metric in both runs, as SVG."""
    found = next(found for found in diseased.findings if found.name == name)
    last = max(diseased.metrics)
    curves = []
    for i, run in enumerate((healthy, diseased)):
        steps, values = run.series(found.metric)
        until = [j for j, step in enumerate(steps) if step <= last]
        curves.append(charts.Curve(i, "", [steps[j] for j in until], [values[j] for j in until]))
    drawing = charts.curves(curves, [charts.Mark(1, found.begin, name)])
    assert drawing
    parts = [f'<text class="title" x="8" y="14">{escape(found.metric)}</text>']
    parts += [
        f'<text class="run-{i}" x="{charts.WIDTH - 8}" y="{14 + 13 * i}" text-anchor="end">{label}</text>'
        for i, label in enumerate(("healthy", name)) if curves[i].steps
    ]  # fmt: skip
    parts.append('<g transform="translate(0 24)">')
    for y, text in drawing.y_ticks:
        parts.append(f'<path class="grid" d="M{charts.LEFT} {y:.1f}H{charts.WIDTH - charts.RIGHT}"/>')
        parts.append(f'<text x="{charts.LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    parts += [
        f'<text x="{x:.1f}" y="{charts.HEIGHT - 6}" text-anchor="middle">{text}</text>' for x, text in drawing.x_ticks
    ]
    bottom = charts.HEIGHT - charts.BOTTOM
    parts += [f'<path class="mark {c}" d="M{x:.1f} {charts.TOP}V{bottom}"/>' for x, c, _ in drawing.marks]
    parts += [f'<path class="{shape.classes}" d="{shape.d}"/>' for shape in drawing.shapes]
    parts += [f'<circle class="{c}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y, c in drawing.dots]
    box = f'viewBox="0 0 {charts.WIDTH} {charts.HEIGHT + 24}" width="{charts.WIDTH}"'
    body = "\n".join([*parts, "</g>"])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box}>\n<style>{STYLE}</style>\n{body}\n</svg>\n'


if __name__ == "__main__":
    main(sys.argv[1:] or list(DISEASES))
