# `make` lists the targets. Each sets up .venv from requirements/cpu.txt when needed; delete .venv to start afresh.

VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
# An interpreter of one's own: make test PYTHON=/path/to/python3.11
PYTHON  ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)

# Two processes of a test, or a trainer and a server, share the cores: more threads each only makes them wait.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1
export VLLM_NO_USAGE_STATS ?= 1
export PYTHONUNBUFFERED := 1

PYTEST  := $(BIN)/python -m pytest
# Two workers: the cores of a small machine. Tests that start processes of their own run one at a time instead.
UNIT    := $(PYTEST) --numprocesses 2 --dist loadfile --durations=5 tests/unit
# The pinned list is for CPUs: an environment with a CUDA build of torch, vLLM and the tests' packages.
GPU_PYTHON ?= python3
BENCH   ?= --engine gloo --json runs/bench_engine.json
BENCH_GATHER ?= --json runs/bench_gather.json
BENCH_LORA ?= --json runs/bench_lora.json

.DEFAULT_GOAL := help
.PHONY: help setup demo tenants test test-fast test-distributed test-vllm test-gpu lint format clean clean-venv \
	bench bench-gather bench-lora

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## create .venv from the pinned list (about 3 minutes, once)

demo: $(STAMP)  ## GRPO on arithmetic: a Lightning trainer, a real vLLM server, and a control without syncing
	$(BIN)/python -m recipes.demo

tenants: $(STAMP)  ## GRPO of two adapters at once, by two trainers on one real vLLM server
	$(BIN)/python -m recipes.tenants --config configs/tenants.yaml

test: $(STAMP)  ## all tests: unit, then several processes, then vLLM
	$(UNIT)
	$(PYTEST) --durations=15 tests/distributed tests/vllm

test-fast: $(STAMP)  ## unit tests only, under 90 seconds
	$(UNIT)

test-distributed: $(STAMP)  ## tests with several trainer processes
	$(PYTEST) --durations=5 tests/distributed

test-vllm: $(STAMP)  ## tests with a real vLLM
	$(PYTEST) --durations=5 tests/vllm

test-gpu:  ## tests that need an NVIDIA GPU; name an environment with CUDA: make test-gpu GPU_PYTHON=/path/to/python
	$(GPU_PYTHON) -m pytest -n0 --durations=10 tests/gpu

lint: $(STAMP)  ## ruff, mypy --strict on the package, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## let ruff fix and format what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## engine benchmark against raw Gloo; other arguments with BENCH=...
	@mkdir -p runs
	$(BIN)/python benchmarks/bench_engine.py $(BENCH)

bench-gather: $(STAMP)  ## gathering benchmark against what users do today; other arguments with BENCH_GATHER=...
	@mkdir -p runs
	$(BIN)/python benchmarks/bench_gather.py $(BENCH_GATHER)

bench-lora: $(STAMP)  ## an adapter brought to vLLM alone, by files, and merged; other arguments with BENCH_LORA=...
	@mkdir -p runs
	$(BIN)/python benchmarks/bench_lora.py $(BENCH_LORA)

clean:  ## remove caches and the results in runs/
	rm -rf runs build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

clean-venv:  ## remove .venv
	rm -rf $(VENV)

# Two steps, so that an edit of pyproject.toml alone does not check the whole list again.
$(VENV)/.pinned: requirements/cpu.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or later found; install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: PYTHON=$(PYTHON) does not run or is older than 3.11; name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "== creating $(VENV) with $$($(PYTHON) --version)"
	$(PYTHON) -m venv $(VENV)
	@echo "== installing the pinned list, about 3 minutes; the last step of pip, which unpacks torch and vLLM, is silent for a minute"
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -r requirements/cpu.txt
	@$(BIN)/python -c 'import torch, sys; sys.exit(torch.version.cuda is not None)' || \
		{ echo "error: this torch is no CPU build; point pip at one with PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS, then: make clean-venv setup" >&2; exit 1; }
	@touch $@

$(STAMP): $(VENV)/.pinned pyproject.toml
	@echo "== installing this package, editable"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@touch $@
