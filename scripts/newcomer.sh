#!/usr/bin/env bash
# The first hour of somebody new, from the README: a fresh environment outside the tree, its lines in their order, data and
# rewards of one's own, resume, export, and what was exported loaded without longgrpo.
#   newcomer.sh WHEEL [fast]     fast: without the README's own example
# PYTHON: the interpreter (default python3); KEEP=1 keeps the folder.
set -euo pipefail

tree=$(cd "$(dirname "$0")/.." && pwd)
wheel=$(realpath "$1")
fast=${2:-}
home=$(mktemp -d)
[ -n "${KEEP:-}" ] || trap 'rm -rf "$home"' EXIT
cd "$home"
export LONGGRPO_CACHE=$home/cache OMP_WAIT_POLICY=passive
unset PYTHONPATH VIRTUAL_ENV

step() {
  local title=$1 start=$SECONDS
  shift
  printf '==> %s ... ' "$title"
  "$@" >"$home/log" 2>&1 || {
    printf 'failed\n'
    tail -n 40 "$home/log" >&2
    exit 1
  }
  printf '%d s\n' $((SECONDS - start))
}

block() { # the first block of shell in the README in which $1 stands
  python - "$tree/README.md" "$1" <<'PY'
import re, sys
blocks = re.findall(r"```sh\n(.*?)```", open(sys.argv[1]).read(), re.DOTALL)
print(next(block for block in blocks if sys.argv[2] in block))
PY
}

"${PYTHON:-python3}" -m venv .venv
PATH=$home/.venv/bin:$PATH
mkdir dist && ln -s "$wheel" dist/
kind=cpu
command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1 && kind=cuda
block "[train,$kind]" >install.sh
step "install, as the README says for $kind" bash -euo pipefail install.sh
step "doctor" python -m longgrpo.doctor

if [ -z "$fast" ]; then
  ln -s "$tree/examples" examples
  block "--output_dir runs/mine" >first.sh
  step "the README's example: train, resume, report" bash -euo pipefail first.sh
fi

mkdir own && cd own
cat >my_rewards.py <<'PY'
import re


def correct(completions, answer, **columns):
    return [float(re.findall(r"\d+", text)[-1:] == [right]) for text, right in zip(completions, answer, strict=True)]


def brief(completion_ids, **columns):
    return [1 / len(ids) for ids in completion_ids]
PY
python - >sums.jsonl <<'PY'
import json

for a in range(2, 8):
    for b in range(2, 8):
        print(json.dumps({"prompt": f"What is {a} + {b}? Answer with the number.", "answer": str(a + b)}))
PY
cat >sums.yaml <<'YAML'
model: {path: smollm2-135m-instruct}
lora: {rank: 8}
task: {name: sums.jsonl, eval_n: 8}
rewards:
  - {function: "my_rewards.py:correct"}
  - {function: "my_rewards.py:brief", weight: 0.2}
rollout: {num_generations: 4, max_completion_length: 16}
train: {steps: 3, prompts_per_step: 4, probe_prompts: 2, learning_rate: 1.0e-3}
output_dir: ../runs/own
YAML
step "own data, two rewards, three steps" longgrpo train sums.yaml
step "evaluate" longgrpo eval ../runs/own --show 1
step "resume" longgrpo train --resume ../runs/own --train.steps 4
step "base and trained side by side" longgrpo sample ../runs/own --n 2
step "export the adapter" longgrpo export ../runs/own adapter
step "export the model" longgrpo export ../runs/own model --as model
cat >load.py <<'PY'
"""Without longgrpo: the adapter on its base, and the merged model, say the same; the base says something else."""
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = next(path.parent for path in Path(sys.argv[1]).glob("*/config.json"))
ids = AutoTokenizer.from_pretrained("model")("What is 2 + 3?", return_tensors="pt").input_ids
with torch.no_grad():
    untrained = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = untrained(ids).logits
    adapted = PeftModel.from_pretrained(untrained, "adapter")(ids).logits
    merged = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)(ids).logits
assert "longgrpo" not in sys.modules
assert (adapted - merged).abs().max() < 1e-4, (adapted - merged).abs().max()
assert (adapted - before).abs().max() > 1e-3
PY
step "load both with transformers and PEFT" python load.py "$LONGGRPO_CACHE"
step "report" longgrpo report ../runs/own
if browser=$(command -v chromium || command -v google-chrome); then
  browse() {
    timeout 120 "$browser" --headless --no-sandbox --disable-gpu --enable-logging=stderr --virtual-time-budget=5000 \
      --user-data-dir="$home/browser" --dump-dom "file://$home/runs/own/report.html"
    ! grep -E 'CONSOLE.*(Uncaught|[Ee]rror)' "$home/log"
    grep -q '</html>' "$home/log"
  }
  step "the report in a browser, without an error" browse
else
  echo "==> no chromium: the report is not opened"
fi
echo "a newcomer's first hour: all of it works"
