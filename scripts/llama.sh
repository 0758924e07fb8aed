#!/usr/bin/env bash
# Compiles the pinned llama-cpp-python for a kind of device, into the environment of a Python that is there.
#
#   scripts/llama.sh PYTHON BACKEND       `make setup BACKEND=…` calls it; BACKEND: cpu, cuda, metal, rocm or vulkan
#
# cuda takes the nvcc that is on PATH or in /usr/local/cuda. Where there is none with cuBLAS, NVIDIA's compiler and
# libraries come from PyPI into the environment: about 1 GB. CUDA_ARCHITECTURES=86 compiles for cards of compute
# capability 8.6; unset, for the card that is here, or where there is none for those from 7.5 on, which takes several times
# as long.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PIP_DISABLE_PIP_VERSION_CHECK=1
export CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc 2>/dev/null || sysctl -n hw.ncpu)}"

die() { echo "llama: $*" >&2; exit 2; }

[ $# = 2 ] || die "name a Python and a backend: scripts/llama.sh .venv/bin/python cuda"
python=$1 backend=$2
[ -x "$python" ] || die "there is no Python $python: make an environment first, with python3 -m venv"

# cuda_from_pypi: NVIDIA's packages, in the layout that CMake looks for; sets `toolkit`
cuda_from_pypi() {
  echo "llama: there is no nvcc with cuBLAS here, so NVIDIA's compiler comes from PyPI" >&2
  "$python" -m pip install --progress-bar off 'cuda-toolkit[nvcc,cudart,cublas,cccl,nvvm,crt]==13.0.*'
  toolkit=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13
  [ -x "$toolkit/bin/nvcc" ] || die "NVIDIA's packages have no $toolkit/bin/nvcc: install the CUDA toolkit instead"
  [ -e "$toolkit/lib64" ] || ln -s lib "$toolkit/lib64"
  # The packages have libraries with their version in the name, and linkers look for those without.
  for library in "$toolkit"/lib/lib*.so.[0-9]*; do
    [ -e "${library%%.so.*}.so" ] || ln -s "$(basename "$library")" "${library%%.so.*}.so"
  done
}

case $backend in
  cpu) flags="-DGGML_METAL=off -DGGML_CUDA=off -DGGML_HIP=off -DGGML_VULKAN=off" ;;
  metal) flags="-DGGML_METAL=on" ;;
  rocm) flags="-DGGML_HIP=on" ;;
  vulkan) flags="-DGGML_VULKAN=on" ;;
  cuda)
    flags="-DGGML_CUDA=on"
    nvcc=$(command -v nvcc || command -v /usr/local/cuda/bin/nvcc || true)
    if [ -z "$nvcc" ] || ! echo '#include <cublas_v2.h>' | "$nvcc" -x cu -E - >/dev/null 2>&1; then
      cuda_from_pypi
      nvcc=$toolkit/bin/nvcc
      # Without the driver there is no libcuda to link with, which only this kind of memory needs.
      flags="$flags -DCUDAToolkit_ROOT=$toolkit -DGGML_CUDA_NO_VMM=on -DCMAKE_SHARED_LINKER_FLAGS=-Wl,-rpath,$toolkit/lib"
    fi
    export CUDACXX=$nvcc
    architectures=${CUDA_ARCHITECTURES:-}
    [ -n "$architectures" ] || nvidia-smi >/dev/null 2>&1 || architectures="75-virtual;80-virtual;86-real;89-real;90-virtual"
    [ -z "$architectures" ] || flags="$flags -DCMAKE_CUDA_ARCHITECTURES=$architectures" ;;
  *) die "there is no backend $backend: choose cpu, cuda, metal, rocm or vulkan" ;;
esac

# The stamp keeps what was built, so that another build is not taken for it; one that somebody installed since is newer.
# No wheel cache: it does not know flags.
stamp=$(dirname "$python")/../.llama
pinned=$(grep '^llama-cpp-python==' "$root/requirements.lock")
wanted="$pinned $backend ${CMAKE_ARGS:-} $flags"
installed=$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/llama_cpp/__init__.py
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ] || [ ! -e "$installed" ] || [ "$installed" -nt "$stamp" ]; then
  echo "llama: compiling llama.cpp for $backend" >&2
  CMAKE_ARGS="${CMAKE_ARGS:-} $flags" "$python" -m pip install --progress-bar off --no-cache-dir --force-reinstall --no-deps \
    --no-binary llama-cpp-python "$pinned"
  echo "$wanted" >"$stamp"
fi
