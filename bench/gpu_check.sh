#!/usr/bin/env bash
# Builds the package on a CUDA machine, runs every test that needs a GPU and the CUDA benchmarks.
#
#   bench/gpu_check.sh OUTDIR                 log, device name and benchmark JSON go to OUTDIR
#   bench/gpu_check.sh --without-gpu OUTDIR   the same steps where there is no GPU: everything skips
#
# Needs torch >= 2.11 with CUDA, nvcc, cmake, ninja, pybind11, pytest, pytest-benchmark, hypothesis,
# mpmath, scipy; no network, no data. Under 10 minutes: each stage has a time limit. Exit code 1 where
# a stage failed.
set -uo pipefail

without_gpu=no
if [ "${1:-}" = "--without-gpu" ]; then
  without_gpu=yes
  shift
fi
if [ $# -ne 1 ]; then
  echo "usage: bench/gpu_check.sh [--without-gpu] OUTDIR" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
exec > >(tee "$out/log.txt") 2>&1

failed=()
stage() { # stage NAME SECONDS COMMAND...
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  echo "== $name"
  timeout --kill-after=10 "$limit" "$@"
  code=$?
  echo "== $name: exit code $code after $((SECONDS - start)) s (limit $limit s)"
  [ $code -eq 0 ] || failed+=("$name")
  return $code
}
finish() {
  if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
  fi
  echo "passed in $SECONDS s"
  exit 0
}

if [ $without_gpu = no ]; then
  stage device 30 bash -c 'set -o pipefail; nvidia-smi -L | sed "s/ (UUID.*//" | tee "$0"' "$out/device.txt" || finish
  stage torch 60 "$python" -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())' \
    || finish
fi

stage build 150 env TWOPHASE_CUDA=ON "$python" -m pip install --quiet --no-build-isolation --no-deps \
  --no-index --target "$site" . || finish
# -P: the source folder beside this one has no compiled library.
export PYTHONPATH="$site" PYTHONDONTWRITEBYTECODE=1
stage import 60 "$python" -P -c 'import twophase_ext; info = twophase_ext.build_info(); print(info)
assert info["cuda"], "built without CUDA kernels"' || finish

# Only files with a test for a GPU: the others may need packages that are not on such a machine.
mapfile -t tests < <(grep -lE '^def test_[^(]*\(.*\bdevice\b|mark\.cuda' tests/test_*.py)
stage tests 120 "$python" -P -m pytest -q -m cuda -p no:cacheprovider --benchmark-disable "${tests[@]}"
stage bench 110 "$python" -P -m pytest -q -m cuda -p no:cacheprovider bench/bench_cuda.py \
  --benchmark-json "$out/bench_cuda.json"
stage epoch 60 "$python" -P -m pytest -q -m cuda -p no:cacheprovider bench/bench_cuda_epoch.py \
  --benchmark-json "$out/bench_cuda_epoch.json"
stage first_phase 100 "$python" -P -m pytest -q -m cuda -p no:cacheprovider -k "not compiled" \
  bench/bench_first_phase.py --benchmark-json "$out/bench_first_phase.json"
stage certificate 100 "$python" -P -m pytest -q -m cuda -p no:cacheprovider \
  bench/bench_cuda_certificate.py --benchmark-json "$out/bench_cuda_certificate.json"
finish
