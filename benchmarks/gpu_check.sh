#!/usr/bin/env bash
# Checks and measures vosops on this machine's NVIDIA GPU: builds for the card, runs the GPU tests, compute-sanitizer,
# CUDA graphs, streams and devices, then times every op beside its peers. Needs nvcc and PyTorch 2.10 or newer, no
# network, and 8 minutes; call it again to go on. Writes one JSON into benchmarks/results; then `make gpu-report`.
#   benchmarks/gpu_check.sh [--only STEP[,STEP]] [--seconds 480] [--dry-run] [--again] [--results FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu_check "$@"
