#!/usr/bin/env bash
# The CUDA architecture of the card that is here, as CMake spells it: real code, with the card's own instructions.
set -euo pipefail
command -v nvidia-smi >/dev/null || { echo "longgrpo: no nvidia-smi, so no card to build for: name one, as in ARCH=90a-real" >&2; exit 1; }
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
case $capability in
  90) echo 90a-real ;;
  100 | 103) echo 100f-real ;;
  120 | 121) echo 120f-real ;;
  *) echo "$capability-real" ;;
esac
