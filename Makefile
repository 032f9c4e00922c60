# The first Python that is new enough; override with: make setup PYTHON=python3.12
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done; true)
VENV ?= .venv
MATRIX_VERSION ?= 0.28
MATRIX_PEFT ?= 0.19
MATRIX_VENV ?= .venv-$(MATRIX_VERSION)
DOCS_VENV ?= .venv-docs
PY := $(VENV)/bin/python
ARGS ?=
# Test files at the same time; each engine that a test starts computes on one thread.
JOBS ?= 2
WHAT ?= serving

# Threads that wait must not spin: on a busy machine small models train many times slower otherwise.
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-models serve test test-matrix check lock format docs bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: ## make .venv with what this machine needs (CUDA or CPU engine)
	@$(or $(PYTHON),python3) scripts/setup_env.py --venv $(VENV)

demo: setup ## serve the small base and its adapters that ship with the project, ask them all, print a table, shut down
	@$(PY) -m smoa_serve.demo run $(ARGS)

demo-models: setup ## train the demo's base and adapters anew; ARGS=--ship puts them into the project
	@$(PY) -m tools.demo $(ARGS)

serve: setup ## the demo's server, left running until Ctrl-C
	@$(PY) -m smoa_serve.demo run --keep $(ARGS)

test: setup ## all tests
	@$(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-matrix: ## the tests of the engine and of the PEFT method on the other supported releases of vLLM and PEFT
	@SMOA_VLLM_VERSION=$(MATRIX_VERSION) SMOA_PEFT_VERSION=$(MATRIX_PEFT) $(or $(PYTHON),python3) scripts/setup_env.py --venv $(MATRIX_VENV)
	@$(MATRIX_VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile -m matrix $(ARGS)

check: setup ## ruff (public docstrings too) and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

lock: setup ## write requirements.lock, the versions that CI installs
	@$(PY) scripts/write_lock.py

format: setup ## let ruff repair and format
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

docs: ## build the site from docs/ into build/site, in an environment of its own; a warning is an error
	@test -x $(DOCS_VENV)/bin/zensical || { $(or $(PYTHON),python3) -m venv $(DOCS_VENV) && \
	$(DOCS_VENV)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' \
	| $(DOCS_VENV)/bin/pip install -q -r /dev/stdin; }
	@$(DOCS_VENV)/bin/zensical build --strict --clean

bench: setup ## python -m benchmarks $(WHAT): make bench WHAT=serving ARGS=--quick
	@$(PY) -m benchmarks $(WHAT) $(ARGS)

clean: ## remove environments, demo models and caches
	rm -rf .venv .venv-* .demo build dist .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
