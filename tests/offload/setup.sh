#!/bin/sh
# Builds .venv-offload: llama-cpp-python of requirements.lock with Vulkan, for `make test-offload`.
#
# Debian's Mesa brings llvmpipe, a Vulkan device made of software, so the placement tests meet a real second device
# on a machine without a GPU. The build takes about 30 minutes on two cores, most of it for shaders; after that the
# stamp says that there is nothing to do until the lock names another version.
#
# Settings: PYTHON (python3), CMAKE_BUILD_PARALLEL_LEVEL (all cores).
set -eu

root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root"
venv=$root/.venv-offload
lock=$root/requirements.lock
export PIP_DISABLE_PIP_VERSION_CHECK=1
export CMAKE_BUILD_PARALLEL_LEVEL="${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}"

say() { printf 'offload setup: %s\n' "$*" >&2; }

# 1. Debian's packages: the shader compiler, the headers of SPIR-V and of Vulkan's loader, and Mesa's drivers.
packages="build-essential cmake ninja-build glslc spirv-headers libvulkan-dev mesa-vulkan-drivers"
missing=$(for package in $packages; do
  dpkg-query --show --showformat '${db:Status-Abbrev}' "$package" 2>/dev/null | grep -q '^ii' || echo "$package"
done)
if [ -n "$missing" ]; then
  if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    say "needs these Debian packages, and only root may install them:" $missing
    exit 1
  fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
fi

if [ ! -x "$venv/bin/python" ]; then "${PYTHON:-python3}" -m venv "$venv"; fi
echo '*' > "$venv/.gitignore"

# 2. Vulkan's headers. llama.cpp needs those of 1.4; Debian 12 has 1.3.239. They are only headers, so a newer release's
# package is unpacked beside the virtual environment and nothing of it is installed.
include=/usr/include
if ! grep -q 'define VK_API_VERSION_1_4' "$include/vulkan/vulkan_core.h"; then
  newer=trixie
  scratch=$venv/vulkan-headers
  include=$scratch/root/usr/include
  if [ ! -f "$include/vulkan/vulkan_core.h" ]; then
    codename=$(. /etc/os-release && echo "$VERSION_CODENAME")
    mkdir -p "$scratch/lists/partial" "$scratch/cache/archives/partial" "$scratch/root"
    : > "$scratch/status"
    # The machine's own sources say where Debian is; only the release differs.
    apt-get indextargets --format '$(ORIGIN)|$(RELEASE)|$(COMPONENT)|$(REPO_URI)' 'Created-By: Packages' \
      | awk -F '|' -v old="$codename" -v new="$newer" '$1 == "Debian" && $2 == old && $3 == "main" {
          print "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] " $4 " " new " main" }' \
      | sort -u > "$scratch/newer.list"
    if [ ! -s "$scratch/newer.list" ]; then
      say "the Vulkan headers of $codename are too old, and apt names no Debian source to take $newer's from;" \
        "install headers of 1.4 or later under /usr/include"
      exit 1
    fi
    newer_apt() {
      apt-get -qq -o Dir::Etc::SourceList="$scratch/newer.list" -o Dir::Etc::SourceParts=- \
        -o Dir::State::Lists="$scratch/lists" -o Dir::State::Status="$scratch/status" \
        -o Dir::Cache="$scratch/cache" -o APT::Sandbox::User=root "$@"
    }
    newer_apt update
    (cd "$scratch" && newer_apt download libvulkan-dev && dpkg -x libvulkan-dev_*.deb root)
    rm -rf "$scratch/lists" "$scratch/cache"
  fi
fi

# 3. The same lock as .venv, with llama.cpp compiled anew. No wheel cache: it holds the CPU's build under the same name,
# and this one must not get in there.
pinned=$(grep '^llama-cpp-python==' "$lock")
if [ "$(cat "$venv/.built" 2>/dev/null)" != "$pinned" ]; then
  say "compiling llama.cpp with Vulkan, about 30 minutes on two cores"
  CMAKE_ARGS="-DGGML_VULKAN=ON -DVulkan_INCLUDE_DIR=$include" \
    "$venv/bin/python" -m pip install --quiet --no-cache-dir --force-reinstall --no-deps \
    --no-binary llama-cpp-python "$pinned"
  echo "$pinned" > "$venv/.built"
fi
"$venv/bin/python" -m pip install --quiet --requirement "$lock"
"$venv/bin/python" -m pip install --quiet --no-deps --editable "$root"
# Of the development lock only what runs the tests: the rest wants other versions of what opsin needs.
"$venv/bin/python" -m pip install --quiet $(grep -E '^(hypothesis|pytest|pytest-timeout)==' requirements-dev.lock)
touch "$venv/.ready"
