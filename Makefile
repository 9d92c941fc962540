# Every target installs what it needs into .venv first: the versions in requirements/dev.txt, and one MLX backend.
#   make test BACKEND=cpu     metal | cpu | cuda12 | cuda13; default: what this machine can run
#   make serve MODEL=Qwen/Qwen3-0.6B PORT=9000

MODEL ?= demo
HOST ?= 127.0.0.1
PORT ?= 8000

LOAD_PORT ?= 8765
LOAD_USERS ?= 16
LOAD_TIME ?= 20s

SOAK_REQUESTS ?= 20000

# mflux requires a CUDA build of an older MLX, so it is installed without its dependencies. Its text encoders need three.
MFLUX := mflux==0.24.0 platformdirs piexif toml

# The first of these that is Python 3.11 or later.
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

# An environment keeps its backend; a new one takes the best for this machine. CUDA 13 needs driver 580, CUDA 12 needs 550.
INSTALLED := $(patsubst .venv/installed-%,%,$(wildcard .venv/installed-*))
DETECT = if [ "$$(uname -s)" = Darwin ]; then echo metal; exit; fi; \
	driver=$$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d . -f 1); \
	if [ "$${driver:-0}" -ge 580 ] 2>/dev/null; then echo cuda13; \
	elif [ "$${driver:-0}" -ge 550 ] 2>/dev/null; then echo cuda12; else echo cpu; fi
ifndef BACKEND
BACKEND := $(or $(INSTALLED),$(shell $(DETECT)))
endif
EXTRA := $(if $(filter metal,$(BACKEND)),,$(BACKEND),)

# PyTorch's own index has CPU builds for Linux. PyPI's build for Linux requires several GB of CUDA libraries.
TORCH := torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

VENV := .venv/installed-$(BACKEND)
VENV_PARITY := .venv-parity/installed-$(BACKEND)
VENV_LOWEST := .venv-lowest/installed-$(BACKEND)
BIN := .venv/bin
PACKAGE := pyproject.toml setup.py $(wildcard encoder/qwen3/cpu/kernels/c/*)  # an installation is older than none of these

# One lock for all platforms, Pythons and backends; PyTorch is pinned in pyproject.toml.
COMPILE = .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --extra cpu --extra cuda12 --extra cuda13 \
	--extra dev --custom-compile-command "make lock" pyproject.toml

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install serve test robustness test-parity test-lowest bench bench-gpu bench-micro bench-soak docs lint format \
	types imports check load lock audit clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

install: $(VENV) ## create .venv with the MLX backend for this machine

serve: $(VENV) ## serve MODEL (the demo checkpoint) on HOST:PORT (127.0.0.1:8000)
	$(BIN)/python -m app serve --model $(MODEL) --host $(HOST) --port $(PORT)

test: $(VENV) ## run the tests that need no PyTorch
	$(BIN)/python -m pytest --ignore=tests/parity --numprocesses auto --maxprocesses 4 --dist loadfile

robustness: $(VENV) ## attack a real service for an hour or two: faults, floods, rude clients, signals, kill -9
	$(BIN)/python -m pytest tests/robustness -m "long or not long" --durations 10

test-parity: $(VENV_PARITY) ## compare with PyTorch, transformers and diffusers, in .venv-parity
	.venv-parity/bin/python -m pytest tests/parity tests/examples

# Old versions warn of what newer Pythons have deprecated, so warnings are not errors here.
test-lowest: $(VENV_LOWEST) ## run the tests with the lowest versions that pyproject.toml allows, in .venv-lowest
	.venv-lowest/bin/python -m pytest -W default --ignore=tests/parity --ignore=tests/examples \
		--numprocesses auto --maxprocesses 4 --dist loadfile

bench: $(VENV_PARITY) ## measure this CPU, in turns with PyTorch, diffusers and mflux, in ten minutes
	.venv-parity/bin/pip install --quiet --no-deps $(MFLUX)
	.venv-parity/bin/python -m benchmarks.cpu

bench-soak: $(VENV) ## measure memory over SOAK_REQUESTS (20,000) mixed requests
	$(BIN)/python -m benchmarks.soak --requests $(SOAK_REQUESTS) --output benchmarks/results/soak.json

bench-micro: $(VENV) ## measure single steps of a request with pyperf
	$(BIN)/python -m benchmarks.micro --quiet --processes 5

docs: $(VENV) ## write the generated parts of the documents: settings, presets, fields, errors, figures
	$(BIN)/python -m docs.generate

bench-gpu: $(VENV_PARITY) ## measure an NVIDIA GPU; with TORCH_INDEX=https://pypi.org/simple also PyTorch on CUDA
	.venv-parity/bin/python -m benchmarks.gpu --output benchmarks/results/gpu.json

lint: $(VENV) ## check style and formatting
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(VENV) ## rewrite the code in the project's format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV) ## check types, strictly
	$(BIN)/mypy

imports: $(VENV) ## check that modules import only what the layers allow
	$(BIN)/lint-imports

check: lint types imports ## lint, types and imports

load: $(VENV) ## start a server and load it with locust for LOAD_TIME (20s)
	@$(BIN)/python -m app serve --model $(MODEL) --port $(LOAD_PORT) & server=$$!; \
	trap 'kill $$server; wait $$server' EXIT; \
	until $(BIN)/python -c 'import urllib.request as r; r.urlopen("http://127.0.0.1:$(LOAD_PORT)/readyz", timeout=5)' \
		2>/dev/null; do kill -0 $$server || exit 1; sleep 0.5; done; \
	$(BIN)/locust --locustfile tests/load/locustfile.py --host http://127.0.0.1:$(LOAD_PORT) --headless --only-summary \
		--users $(LOAD_USERS) --spawn-rate 8 --run-time $(LOAD_TIME) --stop-timeout 30 --exit-code-on-error 1

lock: .venv-lock/bin/uv ## update requirements/ after a change of pyproject.toml; UPGRADE=--upgrade takes the newest versions
	echo torch | $(COMPILE) $(UPGRADE) --extra parity --excludes /dev/stdin --output-file requirements/dev.txt
	$(COMPILE) $(UPGRADE) --resolution lowest-direct --output-file requirements/lowest.txt

clean: ## remove the environments, caches and build products
	rm -rf .venv .venv-parity .venv-lowest .venv-lock .venv-audit .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# MLX backends overwrite each other's files, so `create` deletes an environment that has another backend, and one whose
# installation was interrupted.
$(VENV): $(PACKAGE) requirements/dev.txt
	$(call create,.venv)
	.venv/bin/pip install --constraint requirements/dev.txt --editable '.[$(EXTRA)dev]'
	@touch $@

# A separate environment: the tests in .venv must pass without PyTorch.
$(VENV_PARITY): $(PACKAGE) requirements/dev.txt
	$(call create,.venv-parity)
	.venv-parity/bin/pip install --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) $(TORCH)
	.venv-parity/bin/pip install --constraint requirements/dev.txt --editable '.[$(EXTRA)dev,parity]'
	@touch $@

# The lowest versions have wheels for the lowest Python alone.
$(VENV_LOWEST): PYTHON := python3.11
$(VENV_LOWEST): $(PACKAGE) requirements/lowest.txt
	$(call create,.venv-lowest)
	.venv-lowest/bin/pip install --constraint requirements/lowest.txt --editable '.[$(EXTRA)dev]'
	@touch $@

audit: .venv-audit/bin/pip-audit ## look up the pinned dependencies in PyPI's list of known vulnerabilities
	.venv-audit/bin/pip-audit --strict --disable-pip --no-deps --requirement requirements/dev.txt

.venv-audit/bin/pip-audit:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install 'pip-audit>=2.10,<3'

# Not in .venv, which cannot be installed while the lock contradicts pyproject.toml.
.venv-lock/bin/uv:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install 'uv>=0.13,<0.14'

define create
@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed, and no python3.13, python3.12, python3.11 or python3 is one. \
	Name one with PYTHON=/path/to/python." >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' || { echo "$(PYTHON) has no venv module. On Debian and Ubuntu: \
	apt-get install python3-venv" >&2; exit 1; }
@test -e $(1)/installed-$(BACKEND) || rm -rf $(1)
@rm -f $(1)/installed-*
$(PYTHON) -m venv $(1)
endef
