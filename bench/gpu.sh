#!/usr/bin/env bash
# `make gpu`: builds for the card that is here, runs the GPU tests and the benchmarks, and writes
# bench/results/<card>-<date>.json. Downloads nothing: needs torch >= 2.11 (CUDA), nvcc, cmake >= 3.31, ninja and pytest.
#   bench/gpu.sh [PYTHON [STAGE ...]]
# Stages: build test sanitize bench peers step; all of them by default. What a stage found stays in build/gpu, and the
# record is written anew however the script ends, from all that is there.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
stages=" ${*:2} "
(($# > 1)) || stages=" build test sanitize bench peers step "
build=build/gpu
status=0

fail() {
  printf 'longgrpo: %s\n' "$1" >&2
  exit 1
}
command -v nvidia-smi >/dev/null || fail "no nvidia-smi: make gpu needs an NVIDIA GPU"
command -v nvcc >/dev/null || fail "no nvcc on PATH: put the CUDA toolkit's bin folder there"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  fail "$python has no torch that sees the GPU: make gpu PYTHON=/path/to/python"

card=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)
architecture=$(scripts/architecture.sh)

wanted() { [[ $stages == *" $1 "* ]]; }
export PYTHONPATH=$PWD/python${PYTHONPATH:+:$PYTHONPATH}
# fp32 is fp32 in the tests and in the peers, whatever a container sets.
export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0
unset NVIDIA_TF32_OVERRIDE

results=bench/results
name=$results/$(echo "$card" | tr ' /' '--')-$(date +%Y-%m-%d)
mkdir -p $results $build

record() {
  "$python" - "$name.json" $build "$card" <<'PY'
import json, subprocess, sys, xml.etree.ElementTree as xml
from pathlib import Path

import torch

out, build, card = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
record = {
    "card": card, "commit": commit, "torch": torch.__version__, "cuda": torch.version.cuda,
    "driver": driver.stdout.split("\n")[0], "python": sys.version.split()[0],
}
if (tests := build / "tests.xml").is_file():
    suite = xml.parse(tests).getroot().find("testsuite").attrib
    record["tests"] = {name: int(suite[name]) for name in ("tests", "failures", "errors", "skipped")}
for name in ("cases", "peers"):
    if (lines := build / f"{name}.jsonl").is_file():
        record[name] = [json.loads(line) for line in lines.read_text().splitlines()]
Path(out).write_text(json.dumps(record, indent=1))
print(out)
PY
}
trap record EXIT

if wanted build; then
  echo "==> build for $card ($architecture)"
  cmake -S . -B $build -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" -DLONGGRPO_BENCH_CUDA=ON \
    "-DLONGGRPO_CUDA_ARCHITECTURES=$architecture"
  cmake --build $build
  [[ -f $build/_cuda.so ]] || fail "cmake left the CUDA part out, which takes cmake >= 3.31 (pip install cmake) and nvcc >= 13"
  cp $build/_cpu.so $build/_cuda.so $build/_sources.sha256 python/longgrpo/
fi

if wanted test; then
  echo "==> tests"
  rm -f $build/tests.xml
  "$python" -m pytest -q tests/gpu --junitxml=$build/tests.xml || status=1
fi

if wanted sanitize && command -v compute-sanitizer >/dev/null; then
  echo "==> compute-sanitizer"
  for tool in memcheck racecheck; do
    compute-sanitizer --tool $tool --error-exitcode 9 --target-processes all "$python" -m pytest -q -p no:cacheprovider \
      tests/gpu -k "mixed_dtypes or exact_kl and dapo" || { echo "compute-sanitizer $tool found something"; status=1; }
  done
fi

if wanted bench; then
  echo "==> benchmarks"
  cublas=$("$python" -c 'import torch; torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")
print(next(l.split()[-1] for l in open("/proc/self/maps") if "libcublas.so" in l))')
  rm -f $build/cases.jsonl
  for workspace in 256 1024; do
    rm -f $build/part.jsonl
    # torch's cuBLAS wants the cuBLASLt beside it, and not the toolkit's.
    LD_LIBRARY_PATH=$(dirname "$cublas")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} \
      $build/bench_cuda --workspace $workspace --cublas "$cublas" --json $build/part.jsonl \
      --about "\"workspace_mib\": $workspace" || status=1
    if [[ -f $build/part.jsonl ]]; then cat $build/part.jsonl >>$build/cases.jsonl; fi
  done
fi

if wanted peers; then
  echo "==> peers"
  rm -f $build/peers.jsonl
  "$python" bench/peers.py --device cuda --seconds 5 --json $build/peers.jsonl || status=1
fi

if wanted step; then
  echo "==> step"
  if "$python" -c 'import transformers, peft, pydantic' 2>/dev/null; then
    "$python" bench/step.py --json "$name-step.json" || status=1
  else
    echo "no transformers, peft or pydantic: bench/step.py is left out"
  fi
fi
exit $status
