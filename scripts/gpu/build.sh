#!/usr/bin/env bash
# A Python environment with llama.cpp compiled for this machine's NVIDIA GPU, for scripts/gpu/measure.sh.
#
#   scripts/gpu/build.sh FOLDER        then: scripts/gpu/measure.sh --python FOLDER/bin/python RESULTS
#     --cpu   compile without CUDA
#
# Needs Linux, python3 with venv, a C++ compiler and, without --cpu, NVIDIA's driver and CUDA toolkit (nvcc).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1
export CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}"

die() { echo "build: $*" >&2; exit 2; }
need() { command -v "$1" >/dev/null || die "$1 is missing: $2"; }

flags=-DGGML_CUDA=on folder=""
for word in "$@"; do
  case $word in
    --cpu) flags="" ;;
    -*) die "there is no option $word: see the head of this script" ;;
    *) [ -z "$folder" ] || die "name one folder only"; folder=$word ;;
  esac
done
[ -n "$folder" ] || die "name a folder for the environment: scripts/gpu/build.sh build/gpu/venv"
need python3 "install Python 3.11 or later"
if [ -n "$flags" ]; then
  need nvidia-smi "install NVIDIA's driver, or try --cpu"
  need nvcc "install the CUDA toolkit and put its bin folder on PATH, or try --cpu"
fi

[ -x "$folder/bin/python" ] || python3 -m venv "$folder"
python=$folder/bin/python
# The stamp keeps the flags, so a build without CUDA is not mistaken for one with it. No wheel cache: a build with other
# flags has the same name there.
if [ "$(cat "$folder/.built" 2>/dev/null)" != "flags:$flags" ]; then
  echo "build: compiling llama.cpp ${flags:+with $flags}" >&2
  CMAKE_ARGS=$flags "$python" -m pip install --quiet --no-cache-dir --force-reinstall --no-deps \
    --no-binary llama-cpp-python "$(grep '^llama-cpp-python==' "$root/requirements.lock")"
  echo "flags:$flags" >"$folder/.built"
fi
"$python" -m pip install --quiet --requirement "$root/requirements.lock"
"$python" -m pip install --quiet --no-deps --editable "$root"
