#!/usr/bin/env bash
# Where does a model run on this machine's GPU, how fast, and does doctor notice when the vision encoder is not there?
# Short steps, most important first; each has a time limit and writes its result as it ends. README.md has them all.
#
#   scripts/gpu/measure.sh [options] RESULTS [STEP...]      without STEP: all of them
#     --shape SHAPE    of the random-weight pair (llava-1.5-7b); `tiny` rehearses on a machine without a GPU
#     --python PATH    a Python that has opsin (python3); `make setup BACKEND=cuda` makes one in .venv
#     --work DIR       where the pairs go (build/gpu); 5 GB for llava-1.5-7b, and 15 GB more for a moment
#     --against X      for the steps bench, questions and long: a server to measure in turn, NAME=URL or opsin-http;
#                      without it a llama-server is started for each, where PATH has one
#     --seconds N      begin no step after so many seconds, and cut the one that runs then
#     --archive FILE   also pack RESULTS into this .tar.gz, anew after every step
#
# RESULTS gets STEP.out and STEP.err, the JSON documents, and steps.tsv, to which every step adds its exit code, the
# expected one and its seconds; bounds.txt says which bounds are kept. Ends with 0 when every step ended as expected.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
steps="machine synth ask doctor placed encoder_on_cpu missed founding bench many ceilings questions long captions"
steps="$steps sampling shapes ask_again quick predict overhead tune"
shape=llava-1.5-7b python=python3 work=$root/build/gpu results="" against="" chosen="" seconds="" archive=""

die() { echo "measure: $*" >&2; exit 2; }

while [ $# -gt 0 ]; do
  case $1 in
    --shape | --python | --work | --against | --seconds | --archive)
      [ $# -gt 1 ] || die "$1 needs a value"
      case $1 in
        --shape) shape=$2 ;;
        --python) python=$2 ;;
        --work) work=$2 ;;
        --seconds) seconds=$2 ;;
        --archive) archive=$2 ;;
        *) against=$2 ;;
      esac
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
[[ $seconds =~ ^[0-9]*$ ]] || die "--seconds needs a whole number"
mkdir -p "$results" "$work"
results=$(cd "$results" && pwd)
work=$(cd "$work" && pwd)
python=$(command -v "$python") || die "there is no such Python: give one with --python"
case $python in /*) ;; *) python=$PWD/$python ;; esac
if [ -n "$archive" ]; then
  folder=$(cd "$(dirname "$archive")" 2>/dev/null && pwd) || die "there is no folder for the archive $archive"
  archive=$folder/$(basename "$archive")
fi
cd "$work" # away from any opsin.toml
export root python shape work results against

machine() {
  uname -srm
  git -C "$root" rev-parse HEAD 2>/dev/null || echo "not a git checkout"
  grep -m 1 'model name' /proc/cpuinfo
  nproc
  grep MemTotal /proc/meminfo
  df -h "$work"
  command -v llama-server llama-batched-bench || echo "llama.cpp's own programs are not on PATH"
  ! command -v nvidia-smi >/dev/null ||
    nvidia-smi --query-gpu=name,driver_version,memory.total,memory.free,pcie.link.gen.max,power.limit --format=csv
  "$python" --version
  "$python" -c 'from importlib.metadata import version; print("llama-cpp-python", version("llama-cpp-python"))'
  "$python" -c 'from opsin.compose import gpu_names; print("GPUs of this build:", *gpu_names())'
}

has_gpu() {
  "$python" -c 'import sys; from opsin.compose import gpu_names; sys.exit(not gpu_names())' 2>/dev/null
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
synth() { "$python" "$root/tools/synth.py" --shape "$1" --type "$2" --mmproj-type f16 --out "$3" --force; }

ask() {
  opsin ask "$root/src/opsin/models/demo/shapes.png" "What is this?" "${pair[@]}" --max-tokens 54 --temperature 0 \
    --no-guard --json
}

one_image() { "$python" "$root/bench/one_image.py" --runs "$warm" "$@"; }

# workloads NAME CTX SLOTS OPTION...: `opsin bench engine`, beside the server that was named, or else a llama-server
workloads() {
  local name=$1 sizes=(--ctx "$2" --parallel "$3")
  local command=("$python" -m opsin bench engine "${pair[@]}" "${sizes[@]}" --runs "$runs" "${@:4}"
    --json-out "$results/$name.json")
  if [ -n "$against" ]; then
    "${command[@]}" --against "$against"
  else
    "$python" "$root/scripts/gpu/beside.py" "${pair[@]}" "${sizes[@]}" --log "$results/$name.server.log" \
      -- "${command[@]}"
  fi
}

# many STREAMS: answers of 128 tokens, each about an image of its own
many() {
  local program
  program=$(command -v llama-batched-bench) || echo "there is no llama-batched-bench on PATH" >&2
  "$python" "$root/bench/batched_bench.py" "${pair[@]}" --sequences "$1" --ctx "$(($1 * 1024))" --no-schema \
    --runs "$runs" ${program:+--program "$program"} --json-out "$results/batched-$1.json"
}

captions() {
  "$python" "$root/bench/captions.py" "${pair[@]}" --images "$images" --json-out "$results/captions.json"
}

# sampling NAME MODEL: decoding with tokens sampled on the GPU and on the CPU
sampling() {
  # shellcheck disable=SC2086 # a word for each number
  "$python" "$root/bench/device_sampling.py" --model "$2" --streams $streams --runs "$runs" \
    --json-out "$results/sampling-$1.json"
}

tiny_152k() { synth tiny-152k q4_0 "$work" && sampling tiny-152k "$work/tiny-152k-q4_0.gguf"; }

# one_shape SHAPE TYPE: written, asked once warm, and deleted, so that the disk does not fill
one_shape() {
  trap 'rm -rf "$work/shape"' EXIT
  synth "$1" "$2" "$work/shape" &&
    one_image --model "$work/shape/$1-$2.gguf" --mmproj "$work/shape/mmproj-$1-f16.gguf" \
      --json-out "$results/shape-$1-$2.json"
}

overhead() {
  "$python" "$root/tools/synth.py" --shape tiny --out "$work" --force &&
    "$python" "$root/bench/token_cost.py" --model "$work/tiny-q8_0.gguf" --mmproj "$work/mmproj-tiny-f16.gguf" \
      --runs "$runs" --json-out "$results/overhead.json"
}

export -f machine verdict placed missed opsin synth ask one_image workloads many captions sampling tiny_152k one_shape \
  overhead

failed=0 child=""

# after STEP CODE EXPECTED SECONDS
after() {
  printf '%s\t%s\t%s\t%s\n' "$@" >>"$results/steps.tsv"
  "$python" "$root/scripts/gpu/bounds.py" "$results" >"$results/bounds.txt" 2>/dev/null
  # Renamed at the end, so that a run which is cut off leaves a whole one.
  [ -z "$archive" ] || { tar -czf "$archive.part" -C "$results" . && mv "$archive.part" "$archive"; }
}

wanted() { [[ -z $chosen || " $chosen " == *" $1 "* ]]; }

# run STEP LIMIT EXPECTED COMMAND...: unless other steps were chosen; STEP:NAME is a part of a step
run() {
  local step=${1%%:*} name=${1#*:} limit=$2 expected=$3 code=0 started=$SECONDS
  shift 3
  wanted "$step" || return 0
  if [ -n "$seconds" ]; then
    if ((SECONDS >= seconds)); then
      after "$name" - "$expected" 0
      return
    fi
    ((limit < seconds - SECONDS)) || limit=$((seconds - SECONDS))
  fi
  echo "measure: $name" >&2
  # Behind `wait` a signal to this script is heeded at once, and `timeout` passes it on to all that the step started.
  timeout --kill-after=15 "$limit" bash -c \
    'pair=(--model "$work/$shape-q4_0.gguf" --mmproj "$work/mmproj-$shape-f16.gguf"); "$@"' \
    _ "$@" >"$results/$name.out" 2>"$results/$name.err" </dev/null &
  child=$!
  wait "$child" || code=$?
  child=""
  after "$name" "$code" "$expected" "$((SECONDS - started))"
  if [[ $code != "$expected" && $expected != any ]]; then
    failed=1
    echo "measure: $name ended with $code, not $expected: $(tail -n 1 "$results/$name.err" | cut -c1-300)" >&2
  fi
}

report() {
  column -t -s "$(printf '\t')" "$results/steps.tsv" 2>/dev/null || cat "$results/steps.tsv"
  [ ! -f "$results/bounds.txt" ] || cat "$results/bounds.txt"
}

stop() {
  [ -z "$child" ] || kill "$child" 2>/dev/null
  report
  exit 143
}
trap stop TERM INT

pair=(--model "$work/$shape-q4_0.gguf" --mmproj "$work/mmproj-$shape-f16.gguf")
runs=2 warm=5 minutes=3 counts="32 1 8 64" streams="1 8 32" images=64 many_questions=32
names=W1,W2,W3,W4,W5 long_names=W1,W2,W3,W4 long_answers="128 64"
shapes="llava-1.5-7b:f16 llava-1.5-7b:q8_0 llava-1.5-13b:q4_0 qwen2.5-vl-7b:q4_0 gemma-3-12b:q4_0"
if [ "$shape" = tiny ]; then
  runs=1 warm=2 minutes=0.1 counts="8 1" streams="1 8" images=4 many_questions=9
  names=W1,W3,W4 long_names=W2 long_answers=64 shapes="tiny:f16 qwen2.5vl-tiny:q4_0 gemma3-tiny:q4_0"
fi
export runs warm images streams
[ -f "$results/steps.tsv" ] || printf 'step\texit code\texpected\tseconds\n' >"$results/steps.tsv"

run machine 30 0 machine
run synth 150 0 synth "$shape" q4_0 "$work"
# The first answer behind the start of a process, the load included.
run ask 90 0 ask
# Random weights do not answer like a trained model, so doctor may find other faults: not its exit code proves the
# placement, but these checks of it.
run doctor 120 any opsin doctor "${pair[@]}" --json
run placed 20 0 placed
if { wanted encoder_on_cpu || wanted missed; } && has_gpu; then
  run encoder_on_cpu 120 1 opsin doctor "${pair[@]}" --mmproj-device none --json
  run missed 20 0 missed
fi
run founding 90 0 one_image "${pair[@]}" --json-out "$results/founding.json"
run bench 240 0 workloads bench 32768 8 --workloads "$names"
for count in $counts; do
  run "many:batched-$count" 120 0 many "$count"
done
run ceilings 30 0 "$python" "$root/bench/ceilings.py" --json-out "$results/ceilings.json"
# 32 questions about one image at once, and longer answers.
run questions 120 0 workloads questions 65536 32 --workloads W3 --questions "$many_questions"
for tokens in $long_answers; do
  run "long:long-$tokens" 150 0 workloads "long-$tokens" 32768 8 --workloads "$long_names" --tokens "$tokens"
done
run captions 150 0 captions
run sampling:sampling-tiny-152k 120 0 tiny_152k
run sampling:sampling-pair 180 0 sampling pair "$work/$shape-q4_0.gguf"
for one in $shapes; do
  run "shapes:shape-${one/:/-}" 150 0 one_shape "${one%:*}" "${one#*:}"
done
run ask_again 60 0 ask
run quick 20 0 opsin doctor "${pair[@]}" --quick
run predict 120 0 opsin predict "${pair[@]}" --device this --measure --json-out "$results/predict.json"
run overhead 180 0 overhead
run tune 300 0 opsin tune "${pair[@]}" --minutes "$minutes" --out "$results/opsin.toml" --force \
  --json-out "$results/tune.json"

report
exit "$failed"
