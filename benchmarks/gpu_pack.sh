#!/usr/bin/env bash
# Makes the folder that travels to a machine with a GPU: the committed sources and what was built from them, without
# golden data and pictures, below 64 MiB. There benchmarks/gpu_check.sh compiles nothing.
#   benchmarks/gpu_pack.sh FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:?usage: benchmarks/gpu_pack.sh FOLDER}
limit=$((64 * 1024 * 1024))
[ ! -e "$folder" ] || { echo "gpu_pack.sh: $folder exists; choose another" >&2; exit 2; }
libraries=(vosops/libvosops_cuda.so vosops/libvosops_cpu_avx2.so)
for file in "${libraries[@]}" vosops/build_info.json; do
  [ -f "$file" ] || { echo "gpu_pack.sh: $file is missing: build first (TORCH_CUDA_ARCH_LIST=9.0a for an H100)" >&2; exit 2; }
done
partial="$folder.part$$"
trap 'rm -rf "$partial"' EXIT
mkdir -p "$partial"
git archive HEAD -- vosops csrc setup.py pyproject.toml benchmarks tests/__init__.py tests/conftest.py tests/effort.py \
  tests/fuzz.py tests/ops ':(exclude)benchmarks/results' | tar -x -C "$partial"
cp "${libraries[@]}" vosops/build_info.json "$partial/vosops/"
git rev-parse HEAD > "$partial/COMMIT"
bytes=$(du -sb "$partial" | cut -f1)
[ "$bytes" -lt "$limit" ] || { echo "gpu_pack.sh: $bytes bytes, at most $limit may travel" >&2; exit 1; }
mv "$partial" "$folder"
trap - EXIT
echo "$folder: $bytes bytes; there: benchmarks/gpu_check.sh --commit $(cat "$folder/COMMIT") --results FOLDER"
