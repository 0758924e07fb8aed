#!/usr/bin/env bash
# measure.sh on a machine without a network: llama.cpp for its GPU and Opsin's dependencies come from a kit in the
# ignored folder .gpu, whose setup.sh unpacks them and writes .gpu/env.sh.
#
#   scripts/gpu/offline.sh [options of measure.sh] RESULTS [STEP...]
#
# PY is the Python to use (python3), GPU_HOME where things are unpacked (/tmp/opsin-gpu).
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
export PY=${PY:-python3} GPU_HOME=${GPU_HOME:-/tmp/opsin-gpu}
[ -f "$root/.gpu/setup.sh" ] || { echo "offline: there is no kit in $root/.gpu" >&2; exit 2; }

site=$GPU_HOME/site
if [ ! -e "$GPU_HOME/llama_cpp" ]; then
  mkdir -p "$site"
  for wheel in "$root"/.gpu/wheels/*.whl; do # more wheels than the kit has
    [ ! -e "$wheel" ] || "$PY" -m zipfile -e "$wheel" "$site"
  done
  # llama_cpp imports diskcache for a cache of its own, which Opsin does not use.
  "$PY" -c 'import diskcache' 2>/dev/null || : >"$site/diskcache.py"
  # What it looks at last, behind env.sh, may be older than this checkout: `machine` says whether Opsin can be loaded.
  bash "$root/.gpu/setup.sh" || echo "offline: setup.sh ended with $?" >&2
fi
. "$root/.gpu/env.sh" || exit 2
exec bash "$root/scripts/gpu/measure.sh" --python "$PY" "$@"
