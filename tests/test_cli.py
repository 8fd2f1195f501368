"""The command line where the trainer's dependencies are missing, as after `pip install longgrpo` without its extra."""

import subprocess
import sys

CODE = "import sys; sys.modules['yaml'] = None; from longgrpo.cli import main; sys.exit(main(['plan', 'run.yaml']))"


def test_a_missing_dependency_is_named_with_the_remedy():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "longgrpo: yaml is not installed: pip install 'longgrpo[train]'\n"
