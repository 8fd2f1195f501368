"""Writes docs/healthy-run.md from the table of findings: python scripts/healthy_run_docs.py"""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from pathlib import Path

from longgrpo.config.watch import WatchConfig
from longgrpo.watch.finding import EARNED, Finding
from longgrpo.watch.history import START
from longgrpo.watch.watch import ENDS_AFTER

PAGE = Path(__file__).parents[1] / "docs" / "healthy-run.md"
PICTURES = PAGE.with_suffix("")
HEAD = f"""# Is my run healthy?

A run can go on for hours after it has stopped learning, with a reward that still rises. The watch looks at the
metrics of every step, names what ails the run, and says why it is bad and what to do. It says so once when a
finding begins and once when it ends ({ENDS_AFTER} steps in a row without it): in the terminal, in TensorBoard, on
top of [the report](report.md) with a mark in the chart that shows it, and in `metrics.jsonl`, where the step has
`watch/NAME`, 1 at the beginning and 0 at the end. `summary.json` lists under `findings` what stood at the end. The
watch reads numbers that are on the host anyway; it changes nothing in the run.

```yaml
watch:
  stop_on: [truncated, entropy_collapse] # the run ends at their beginning, with a checkpoint
  truncated: {{share: 0.5}} # a bound of its own
  repetition: null # not looked for
```

The [config](config.md#watch) lists all bounds, each with its reason. What is lost because the replies are right is
no finding: entropy, spread and variety are compared with the share of the reward that is still to be earned,
between the lowest and the highest total that a completion has had in the run, and count only until {EARNED:.0%} of
it is earned. "At the start" is the mean of the first {START} steps. `examples/diseased.yaml` is a run that ails of
several of these.

`python scripts/disease_pictures.py` gives each disease to a tiny model and draws it beside the same run without it;
the upright line is where the watch named it.
"""


def render() -> str:
    return "\n".join([HEAD, *(_section(name, finding) for name, finding in WatchConfig().findings.items())])


def _section(name: str, finding: Finding) -> str:
    bounds = ", ".join(f"`{field.name}` {getattr(finding, field.name):g}" for field in dataclasses.fields(finding))
    parts = [
        f"## {name}",
        _filled(f"{inspect.getdoc(type(finding))} It shows in `{finding.METRIC}`. {finding.WHY}"),
        _filled(f"**What to do.** {finding.CURE}"),
        f"Bounds: {bounds}.",
    ]
    if (PICTURES / f"{name}.svg").exists():
        parts.insert(1, f"![{name}: {finding.METRIC}, by step](healthy-run/{name}.svg)")
    return "\n\n".join(parts) + "\n"


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    PAGE.write_text(render())
