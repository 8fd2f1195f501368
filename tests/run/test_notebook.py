"""The live plots of a notebook, on a display that keeps what it is shown."""

from __future__ import annotations

import re
import sys
import types

import pytest

from longgrpo.config.run import build_config
from longgrpo.run import notebook
from longgrpo.run.trainer import Trainer


@pytest.fixture
def shown(monkeypatch):
    """What a kernel would show, each state of the one output after the other."""
    states = []

    class Output:
        def update(self, html):
            states.append(html)

    display = types.ModuleType("IPython.display")
    display.HTML = str
    display.display = lambda html, display_id: Output()
    ipython = types.ModuleType("IPython")
    ipython.get_ipython = type("ZMQInteractiveShell", (), {})
    ipython.display = display
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return states


def test_a_run_in_a_notebook_draws_itself(tree, tmp_path, shown, capfd):
    tree["task"]["eval_steps"] = 2
    tree["train"]["probe_prompts"] = 0
    Trainer(build_config(tree), tmp_path / "run").run()
    assert len(shown) == 5  # what was measured before, and four steps
    assert "step 4/4" in shown[-1]
    assert "<td>reward/mean</td>" in shown[-1]
    assert len(re.search(r'points="([^"]*)"', shown[-1])[1].split()) == 4
    assert "<td>eval/accuracy</td>" in shown[-1]
    assert "step 3/4" not in capfd.readouterr().err  # no line for each step beside it


def test_a_plot_reaches_from_the_lowest_value_to_the_highest():
    drawn = notebook.plot([(0, 1.0), (5, 3.0), (10, 2.0)], 10)
    assert re.search(r'points="([^"]*)"', drawn)[1] == "0.0,46.0 180.0,2.0 360.0,24.0"
    assert "0.0,46.0" in notebook.plot([(0, 1.0)], 10)


def test_elsewhere_there_is_none():
    assert not notebook.in_notebook()
