#!/usr/bin/env bash
# Checks and measures vosops on this machine's NVIDIA GPU within nine minutes: one tiny call of each op, the C++ tests,
# a profile of every kernel, times beside peers (bfloat16 of every op first), CUDA graphs and streams,
# compute-sanitizer, the Triton tests, Nsight Compute. Each step writes what it has as it goes. Nothing is compiled
# unless --build asks for it: benchmarks/gpu_pack.sh makes the folder that travels. Needs PyTorch 2.10 or newer and no
# network; call it again to go on. Writes one JSON into benchmarks/results; then `make gpu-report`.
#   benchmarks/gpu_check.sh [--build] [--only STEP[,STEP]] [--seconds 540] [--dry-run] [--again] [--results FOLDER]
#                           [--commit COMMIT]
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu_check "$@"
