#!/usr/bin/env bash
# Where does a model run on this machine's GPU, how fast, and does doctor notice when the vision encoder is not there?
# Short steps, most important first; each has a time limit and writes its result as it ends.
#
#   scripts/gpu/measure.sh [options] RESULTS [STEP...]      without STEP: all of them
#     --shape SHAPE    of the random-weight pair (llava-1.5-7b); `tiny` rehearses on a machine without a GPU
#     --python PATH    a Python that has opsin (python3); `make setup BACKEND=cuda` makes one in .venv
#     --work DIR       where the pairs go (build/gpu); 5 GB for llava-1.5-7b
#     --against X      for the steps bench, questions and long: a server to measure in turn, NAME=URL or opsin-http
#
# RESULTS gets STEP.out and STEP.err, the JSON documents, and steps.tsv, to which every step adds its exit code, the
# expected one and its seconds. Ends with 0 when every step ended as expected.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
steps="machine synth ask ask_again quick doctor placed bench questions long encoder_on_cpu missed many captions"
steps="$steps overhead tune predict"
shape=llava-1.5-7b python=python3 work=$root/build/gpu results="" against="" chosen=""

die() { echo "measure: $*" >&2; exit 2; }

while [ $# -gt 0 ]; do
  case $1 in
    --shape | --python | --work | --against)
      [ $# -gt 1 ] || die "$1 needs a value"
      case $1 in --shape) shape=$2 ;; --python) python=$2 ;; --work) work=$2 ;; *) against=$2 ;; esac
      shift ;;
    -*) die "there is no option $1: see the head of this script" ;;
    *)
      if [ -z "$results" ]; then results=$1
      elif [[ " $steps " == *" $1 "* ]]; then chosen="$chosen $1"
      else die "there is no step $1: choose from $steps"; fi ;;
  esac
  shift
done
[ -n "$results" ] || die "name a folder for the results: scripts/gpu/measure.sh docs/results/gpu"
mkdir -p "$results" "$work"
results=$(cd "$results" && pwd)
work=$(cd "$work" && pwd)
python=$(command -v "$python") || die "there is no such Python: give one with --python"
case $python in /*) ;; *) python=$PWD/$python ;; esac
cd "$work" # away from any opsin.toml
export root python shape work results against

machine() {
  uname -srm
  git -C "$root" rev-parse HEAD 2>/dev/null || echo "not a git checkout"
  grep -m 1 'model name' /proc/cpuinfo
  nproc
  grep MemTotal /proc/meminfo
  "$python" --version
  "$python" -c 'from importlib.metadata import version; print("llama-cpp-python", version("llama-cpp-python"))'
  ! command -v nvidia-smi >/dev/null ||
    nvidia-smi --query-gpu=name,driver_version,memory.total,memory.free,pcie.link.gen.max,power.limit --format=csv
}

has_gpu() {
  "$python" -c 'import sys; from opsin.compose import gpu_names; sys.exit(not gpu_names())'
}

# verdict STEP CHECK STATUS...: fails unless doctor's document of that step gives the check one of these states
verdict() {
  "$python" - "$results/$1.out" "${@:2}" <<'PYTHON'
import json
import sys

path, name, *allowed = sys.argv[1:]
with open(path, encoding="utf-8") as file:
    check = next(check for check in json.load(file)["checks"] if check["name"] == name)
print(json.dumps(check, indent=2))
sys.exit(check["status"] not in allowed)
PYTHON
}

placed() { verdict doctor placement.encoder ok && verdict doctor placement.language_model ok; }
missed() { verdict encoder_on_cpu placement.encoder fail; }
opsin() { "$python" -m opsin "$@"; }

ask() {
  opsin ask "$root/src/opsin/models/demo/shapes.png" "What is this?" "${pair[@]}" --max-tokens 54 --temperature 0 \
    --no-guard --json
}

overhead() {
  "$python" "$root/tools/synth.py" --shape tiny --out "$work" --force &&
    "$python" "$root/bench/token_cost.py" --model "$work/tiny-q8_0.gguf" --mmproj "$work/mmproj-tiny-f16.gguf" \
      --runs "$runs" --json-out "$results/overhead.json"
}

# Each number of streams has a file of its own, written as it ends.
many() {
  local program streams
  program=$(command -v llama-batched-bench) || true
  for streams in $counts; do
    "$python" "$root/bench/batched_bench.py" --model "$work/$shape-q4_0.gguf" --sequences "$streams" \
      --ctx "$((streams * 512))" --runs "$runs" ${program:+--program "$program"} \
      --json-out "$results/batched-$streams.json" || return
  done
}

captions() {
  "$python" "$root/bench/captions.py" "${pair[@]}" --images "$images" --json-out "$results/captions.json"
}

# run STEP LIMIT EXPECTED COMMAND...: unless other steps were chosen
run() {
  local name=$1 limit=$2 expected=$3 code=0 started=$SECONDS
  shift 3
  [[ -z $chosen || " $chosen " == *" $name "* ]] || return 0
  echo "measure: $name" >&2
  timeout "$limit" bash -c 'pair=(--model "$work/$shape-q4_0.gguf" --mmproj "$work/mmproj-$shape-f16.gguf"); "$@"' \
    _ "$@" >"$results/$name.out" 2>"$results/$name.err" || code=$?
  printf '%s\t%s\t%s\t%s\n' "$name" "$code" "$expected" "$((SECONDS - started))" >>"$results/steps.tsv"
  if [[ $code != "$expected" && $expected != any ]]; then
    failed=1
    echo "measure: $name ended with $code, not $expected: $(tail -n 1 "$results/$name.err" | cut -c1-300)" >&2
  fi
}
export -f machine verdict placed missed opsin ask overhead many captions

failed=0
pair=(--model "$work/$shape-q4_0.gguf" --mmproj "$work/mmproj-$shape-f16.gguf")
workloads=W1,W2,W3,W4,W5 runs=2 minutes=6 counts="1 8 32 64" images=64 questions=32 long=W1,W2,W3,W4
if [ "$shape" = tiny ]; then workloads=W1 runs=1 minutes=0.1 counts="1 8" images=4 questions=9 long=W2; fi
export runs counts images
[ -f "$results/steps.tsv" ] || printf 'step\texit code\texpected\tseconds\n' >"$results/steps.tsv"

run machine 30 0 machine
run synth 150 0 "$python" "$root/tools/synth.py" --shape "$shape" --type q4_0 --mmproj-type f16 --out "$work" --force
run ask 90 0 ask
run ask_again 60 0 ask
# Random weights do not answer like a trained model, so doctor may find other faults: not its exit code proves the
# placement, but these checks of it.
run quick 10 0 opsin doctor "${pair[@]}" --quick
run doctor 150 any opsin doctor "${pair[@]}" --json
run placed 20 0 placed
run bench 300 0 opsin bench engine "${pair[@]}" --ctx 32768 --parallel 8 --workloads "$workloads" \
  --runs "$runs" ${against:+--against "$against"} --json-out "$results/bench.json"
# 32 questions about one image at once, and longer answers, as they come.
run questions 120 0 opsin bench engine "${pair[@]}" --ctx 65536 --parallel 32 --workloads W3 --questions "$questions" \
  --runs "$runs" ${against:+--against "$against"} --json-out "$results/questions.json"
run long 200 0 opsin bench engine "${pair[@]}" --ctx 32768 --parallel 8 --workloads "$long" --tokens 128 \
  --runs "$runs" ${against:+--against "$against"} --json-out "$results/long.json"
if has_gpu; then
  run encoder_on_cpu 150 1 opsin doctor "${pair[@]}" --mmproj-device none --json
  run missed 20 0 missed
fi
run many 240 0 many
run captions 240 0 captions
run overhead 180 0 overhead
run tune 480 0 opsin tune "${pair[@]}" --minutes "$minutes" --out "$results/opsin.toml" --force \
  --json-out "$results/tune.json"
run predict 150 0 opsin predict "${pair[@]}" --device this --measure --json-out "$results/predict.json"

column -t -s "$(printf '\t')" "$results/steps.tsv" 2>/dev/null || cat "$results/steps.tsv"
exit "$failed"
