#!/usr/bin/env bash
# Where does a LLaVA-1.5-7B run on this machine's NVIDIA GPU, how fast, and does doctor notice when the encoder is not
# there? Builds llama.cpp with CUDA, writes a random-weight pair of that shape, and leaves result files in a folder.
#
#   scripts/gpu_proof.sh [options] RESULTS
#     --cpu          no CUDA, the `tiny` shape, short runs: a rehearsal on a machine without a GPU
#     --python PATH  use this Python, in which opsin is installed, and build nothing
#     --work DIR     where the virtual environment and the pair go (build/gpu-proof); 5 GB
#
# Needs Linux, python3 with venv, a C++ compiler and, without --cpu, NVIDIA's driver and CUDA toolkit (nvcc).
# Ends with 0 when every step ended as it should: doctor finds the encoder and the language model on the GPU, and fails
# with exit code 1 when the encoder is forced to the CPU.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1
export CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}"

die() { echo "gpu_proof: $*" >&2; exit 2; }
need() { command -v "$1" >/dev/null || die "$1 is not here: $2"; }

cpu="" python="" work=$root/build/gpu-proof results=""
while [ $# -gt 0 ]; do
  case $1 in
    --cpu) cpu=yes ;;
    --python | --work)
      [ $# -gt 1 ] || die "$1 wants a value"
      case $1 in --python) python=$2 ;; *) work=$2 ;; esac
      shift ;;
    -*) die "there is no option $1: see the head of this script" ;;
    *) [ -z "$results" ] || die "one folder for results is enough"; results=$1 ;;
  esac
  shift
done
[ -n "$results" ] || die "name a folder for the results: scripts/gpu_proof.sh docs/results/gpu"
mkdir -p "$results" "$work"
results=$(cd "$results" && pwd)
work=$(cd "$work" && pwd)
case $python in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;; esac
# Away from any opsin.toml.
cd "$work"

# shape, then the options that keep a rehearsal short
if [ -n "$cpu" ]; then
  shape=tiny bench=(--workloads W1 --runs 1 --no-batched) tune=(--minutes 0.1)
else
  shape=llava-1.5-7b bench=() tune=()
fi
type=q4_0 mmproj_type=f16

build() {
  need python3 "install Python 3.10 to 3.13"
  [ -x "$work/venv/bin/python" ] || python3 -m venv "$work/venv"
  python=$work/venv/bin/python
  flags=""
  if [ -z "$cpu" ]; then
    need nvidia-smi "install NVIDIA's driver, or rehearse with --cpu"
    need nvcc "install the CUDA toolkit and put its bin folder on PATH, or rehearse with --cpu"
    flags=-DGGML_CUDA=on
  fi
  # The stamp holds the flags, so that a rehearsal's build is not taken for the real one. No wheel cache: builds with
  # other flags have the same name in it.
  if [ "$(cat "$work/venv/.built" 2>/dev/null)" != "flags:$flags" ]; then
    echo "gpu_proof: compiling llama.cpp ${flags:+with $flags}" >&2
    CMAKE_ARGS=$flags "$python" -m pip install --quiet --no-cache-dir --force-reinstall --no-deps \
      --no-binary llama-cpp-python "$(grep '^llama-cpp-python==' "$root/requirements.lock")"
    echo "flags:$flags" >"$work/venv/.built"
  fi
  "$python" -m pip install --quiet --requirement "$root/requirements.lock"
  "$python" -m pip install --quiet --no-deps --editable "$root"
}

failed=0
printf 'step\texit code\texpected\tseconds\n' >"$results/steps.tsv"
# step NAME EXPECTED COMMAND…: standard output to NAME.out, standard error to NAME.err; goes on after a failure
step() {
  local name=$1 expected=$2 code=0 started=$SECONDS
  shift 2
  echo "gpu_proof: $name" >&2
  "$@" >"$results/$name.out" 2>"$results/$name.err" || code=$?
  printf '%s\t%s\t%s\t%s\n' "$name" "$code" "$expected" "$((SECONDS - started))" >>"$results/steps.tsv"
  if [[ $code != "$expected" && $expected != any ]]; then
    failed=1
    echo "gpu_proof: $name ended with $code, not $expected: $(tail -n 1 "$results/$name.err")" >&2
  fi
}

machine() {
  uname -srm
  git -C "$root" rev-parse HEAD 2>/dev/null || echo "no git checkout"
  grep -m 1 'model name' /proc/cpuinfo || true
  grep MemTotal /proc/meminfo || true
  "$python" --version
  "$python" -m pip list 2>/dev/null | grep -iE '^(opsin|llama)' || true
  if [ -z "$cpu" ]; then
    nvidia-smi --query-gpu=name,driver_version,memory.total,memory.free,pcie.link.gen.max,power.limit --format=csv
    nvcc --version | tail -n 2
  fi
}

# verdict STEP CHECK STATUS: what doctor's --json of a step says of one check
verdict() {
  "$python" - "$results/$1.out" "$2" "$3" <<'PYTHON'
import json
import sys

path, name, status = sys.argv[1:]
with open(path, encoding="utf-8") as file:
    check = next(check for check in json.load(file)["checks"] if check["name"] == name)
print(json.dumps(check, indent=2))
sys.exit(check["status"] != status)
PYTHON
}

has_gpu() {
  "$python" -c 'import sys; from opsin.native import devices; sys.exit(not any(one.is_gpu for one in devices()))'
}

[ -n "$python" ] || build
opsin=("$python" -m opsin)
pair=(--model "$work/$shape-$type.gguf" --mmproj "$work/mmproj-$shape-$mmproj_type.gguf")

step machine 0 machine
step synth 0 "${opsin[@]}" synth --shape "$shape" --type "$type" --mmproj-type "$mmproj_type" --out "$work" --force
# Random weights do not answer like a trained model, so doctor may find faults beside the placement: its exit code is
# no proof here, its findings are.
step doctor any "${opsin[@]}" doctor "${pair[@]}" --json
step encoder_placed 0 verdict doctor placement.encoder ok
step language_model_placed 0 verdict doctor placement.language_model ok
if [ -z "$cpu" ] || has_gpu; then
  step gpu_seen 0 has_gpu
  step doctor_encoder_on_cpu 1 "${opsin[@]}" doctor "${pair[@]}" --mmproj-device none --json
  step encoder_missed 0 verdict doctor_encoder_on_cpu placement.encoder fail
fi
step bench_engine 0 "${opsin[@]}" bench engine "${pair[@]}" "${bench[@]}" --json-out "$results/bench_engine.json"
step tune 0 "${opsin[@]}" tune "${pair[@]}" "${tune[@]}" --out "$results/opsin.toml" --force \
  --json-out "$results/tune.json" --plot "$results/tune.svg"
step predict 0 "${opsin[@]}" predict "${pair[@]}" --device this --measure --json-out "$results/predict.json"

column -t -s "$(printf '\t')" "$results/steps.tsv" 2>/dev/null || cat "$results/steps.tsv"
exit "$failed"
