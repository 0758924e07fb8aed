# One door for people and for CI. Every target sets up what it needs.
PYTHON ?= python3
# What llama.cpp is compiled for: cpu, cuda, metal, rocm or vulkan; without it what CMAKE_ARGS and the system say.
BACKEND ?=
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# llama.cpp is compiled once; without this some generators compile one file after another.
export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
# Where bytecode is not kept, every run compiles the package and rewrites the tests anew: a fifth of `make check`.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup setup-dev demo browser postgres test test-jobs test-full test-clients test-offload check format soak docs attack clean

setup: $(VENV)/.ready
	@# It does nothing where the environment has this build already.
	$(if $(BACKEND),scripts/llama.sh $(BIN)/python $(BACKEND))

$(VENV)/.ready: requirements.lock pyproject.toml
	@echo "Setting up $(VENV). llama.cpp is compiled once, which takes some minutes."
	$(PYTHON) -m venv $(VENV)
	@# One line a package, and a sign of life while llama.cpp is compiled.
	$(if $(BACKEND),scripts/llama.sh $(BIN)/python $(BACKEND))
	$(BIN)/python -m pip install --progress-bar off --no-deps --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

setup-dev: $(VENV)/.ready-dev

$(VENV)/.ready-dev: $(VENV)/.ready requirements-dev.lock
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-dev.lock
	touch $@

demo: setup
	$(BIN)/opsin ask src/opsin/models/demo/shapes.png "What is in this picture?" --temperature 0

# The page's tests drive Debian's Chromium; without one, and without the right to install it, they are skipped.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium \
	  >/dev/null; } || echo "no chromium: the tests of the web page will be skipped"

# The store that several servers share is tested on Debian's PostgreSQL, where it can be installed.
postgres:
	@ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends postgresql \
	  >/dev/null; } || echo "no PostgreSQL: its tests will be skipped"

# With Ray, on whose clusters a job must lose nothing.
test: $(VENV)/.ready-jobs browser postgres
	$(BIN)/python -m pytest -n 2 --dist loadfile

$(VENV)/.ready-jobs: $(VENV)/.ready-dev requirements-jobs.lock
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-jobs.lock
	touch $@

# Batch jobs at length: Ray clusters, PostgreSQL, 100,000 rows, 30 kills.
test-jobs: $(VENV)/.ready-jobs postgres
	$(BIN)/python -m pytest -m "" tests/jobs -q -s
	OPSIN_KILLS=30 $(BIN)/python -m pytest tests/e2e/test_cli_batch.py -q -k kills --timeout 1200

# What takes many minutes: every schema on two models with three seeds, and forty answers under the guard.
test-full: setup-dev
	$(BIN)/python -m pytest -m full -s

# Clients with environments of their own, in Python and JavaScript; needs npm.
CLIENTS = tests/e2e/server/programs
.clients/.ready: $(CLIENTS)/requirements.txt $(CLIENTS)/package.json
	$(PYTHON) -m venv .clients/venv
	.clients/venv/bin/python -m pip install --quiet --requirement $(CLIENTS)/requirements.txt
	cp $(CLIENTS)/package.json .clients/
	npm --prefix .clients install --silent --no-audit --no-fund
	touch $@

# Each load tool has its own environment. GuideLLM needs 5 GB, for PyTorch: make test-clients LOAD_TOOLS="aiperf guidellm"
LOAD_TOOLS ?= aiperf
.clients/%/.ready: $(CLIENTS)/requirements-%.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --requirement $<
	touch $@

test-clients: setup-dev .clients/.ready $(LOAD_TOOLS:%=.clients/%/.ready)
	$(BIN)/python -m pytest -q tests/e2e/server/test_clients_programs.py tests/e2e/server/test_clients_second_turn.py

# A build with a second device (Vulkan on Mesa's software device): proves where things run, without a GPU.
.venv-offload/.ready: requirements.lock requirements-dev.lock pyproject.toml tests/offload/setup.sh
	PYTHON="$(PYTHON)" tests/offload/setup.sh

test-offload: .venv-offload/.ready
	GGML_VK_VISIBLE_DEVICES=0 .venv-offload/bin/python -m pytest tests/offload -q -s

# Files whose tests are all slow; reading them takes a second.
SLOW_FILES = $(shell grep -rl --include='test_*.py' '^pytestmark = pytest.mark.slow' tests/unit)

check: setup-dev
	$(BIN)/ruff format --check src tests training tools bench
	$(BIN)/ruff check src tests training tools bench
	@# Types and tests side by side: whichever fails, fails the target.
	@# Plugins that these tests need, by name: importing all that are installed takes seconds.
	@$(BIN)/mypy & types=$$!; \
	PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(BIN)/python -m pytest tests/arch tests/unit -q -x -m "not slow" \
	  -p no:cacheprovider -p xdist.plugin -p pytest_timeout -p _hypothesis_pytestplugin -n 2 $(addprefix --ignore=,$(SLOW_FILES)); \
	tests=$$?; \
	wait $$types && exit $$tests

format: setup-dev
	$(BIN)/ruff format src tests training tools bench
	$(BIN)/ruff check --fix src tests training tools bench

# The documentation as a site in build/site, after its generated pages were written anew.
docs: setup-dev
	$(BIN)/python tools/reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Hostile requests and files against a real server and the command; prints what the next client noticed.
attack: setup-dev
	$(BIN)/python tools/attack.py

soak: setup-dev
	SOAK_MINUTES=$${SOAK_MINUTES:-30} $(BIN)/python -m pytest tests/soak -q -s --timeout 0

clean:
	rm -rf $(VENV) .venv-offload .clients build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
