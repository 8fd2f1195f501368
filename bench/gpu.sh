#!/usr/bin/env bash
# `make gpu`: builds for the card that is here, runs the GPU tests and the benchmarks, and writes
# bench/results/<card>-<date>.json. Downloads nothing: needs torch >= 2.11 (CUDA), nvcc, cmake, ninja and pytest.
#   bench/gpu.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
build=build/gpu

fail() {
  printf 'longgrpo: %s\n' "$1" >&2
  exit 1
}
command -v nvidia-smi >/dev/null || fail "no nvidia-smi: make gpu needs an NVIDIA GPU"
command -v nvcc >/dev/null || fail "no nvcc on PATH: put the CUDA toolkit's bin folder there"
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
  fail "$python has no torch that sees the GPU: make gpu PYTHON=/path/to/python"

card=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
case $capability in
  90) architecture=90a-real ;;
  100 | 103) architecture=100f-real ;;
  120 | 121) architecture=120f-real ;;
  *) architecture=$capability-real ;;
esac

echo "==> build for $card (sm_$capability)"
cmake -S . -B $build -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" -DLONGGRPO_BENCH_CUDA=ON \
  "-DLONGGRPO_CUDA_ARCHITECTURES=$architecture"
cmake --build $build
cp $build/_cpu.so $build/_cuda.so python/longgrpo/
export PYTHONPATH=$PWD/python${PYTHONPATH:+:$PYTHONPATH}

results=bench/results
mkdir -p $results
name=$results/$(echo "$card" | tr ' /' '--')-$(date +%Y-%m-%d)
status=0

echo "==> tests"
"$python" -m pytest -q tests/gpu --junitxml=$build/tests.xml || status=1
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    compute-sanitizer --tool $tool --error-exitcode 9 --target-processes all "$python" -m pytest -q -p no:cacheprovider \
      tests/gpu -k "mixed_dtypes or exact_kl and dapo" || { echo "compute-sanitizer $tool found something"; status=1; }
  done
fi

echo "==> benchmarks"
cublas=$("$python" -c 'import pathlib, torch; torch.ones(2, 2, device="cuda") @ torch.ones(2, 2, device="cuda")
print(next(l.split()[-1] for l in open("/proc/self/maps") if "libcublas.so" in l))')
rm -f $build/cases.jsonl
for workspace in 256 1024; do
  $build/bench_cuda --workspace $workspace --cublas "$cublas" --json $build/part.jsonl \
    --about "\"workspace_mib\": $workspace" || status=1
  cat $build/part.jsonl >>$build/cases.jsonl
done
rm -f $build/peers.jsonl
"$python" bench/peers.py --device cuda --seconds 5 --json $build/peers.jsonl || status=1
if "$python" -c 'import transformers, peft, pydantic' 2>/dev/null; then
  "$python" bench/step.py --json "$name-step.json" || status=1
else
  echo "no transformers, peft or pydantic: bench/step.py is left out"
fi

"$python" - "$name.json" $build/cases.jsonl $build/peers.jsonl $build/tests.xml "$card" <<'PY'
import json, subprocess, sys, xml.etree.ElementTree as xml
import torch

out, cases, peers, tests, card = sys.argv[1:]
suite = xml.parse(tests).getroot().find("testsuite").attrib
driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True)
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
record = {
    "card": card, "commit": commit, "torch": torch.__version__, "cuda": torch.version.cuda,
    "driver": driver.stdout.split("\n")[0], "python": sys.version.split()[0],
    "tests": {k: int(suite[k]) for k in ("tests", "failures", "errors", "skipped")},
    "cases": [json.loads(line) for line in open(cases)],
    "peers": [json.loads(line) for line in open(peers)],
}
json.dump(record, open(out, "w"), indent=1)
print(out)
PY
exit $status
