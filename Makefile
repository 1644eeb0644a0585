# Every target makes its own virtual environment first; once it is there, that costs nothing.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: install demo compare test test-full check unit conformance processes bench experiments one-byte-learning quality clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest -q

install: $(READY)  ## the command, as .venv/bin/gossamer

demo: $(READY)  ## four nodes and one alone train on this machine, merge and report: three to nine minutes
	$(BIN)/gossamer testnet up --run examples/demo.toml --nodes 4 --alone 1 --fresh --dir swarm

compare: $(READY)  ## is the merged model better than the best node alone, and than plain averaging? three seeds
	$(BIN)/python -m benchmarks.compare examples/compare.toml

test: check unit conformance processes  ## what every change must pass

test-full: check  ## everything, the slow tests included
	$(PYTEST) tests

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Each process computes on one thread: the processes are the parallelism.
unit: $(READY)
	OMP_NUM_THREADS=1 $(PYTEST) -n auto --maxprocesses 8 --dist worksteal \
		tests -m "not process and not slow" --ignore tests/conformance

conformance: $(READY)
	$(PYTEST) tests/conformance -m "not process and not slow"

# Two files at a time: most of them wait for something most of the time.
processes: $(READY)
	$(PYTEST) -n 2 --dist loadfile tests -m "process and not slow"

bench: $(READY)
	$(BIN)/python -m benchmarks

experiments: $(READY)  ## the published findings of docs/EXPERIMENTS.md, in full; it writes their tables and pictures
	$(BIN)/python -m benchmarks.experiments

one-byte-learning: $(READY)  ## one byte per probe against fp32 MeZO on text, four nodes against one; what is done is kept
	$(BIN)/python -m benchmarks.one_byte_learning

quality: $(READY)  ## method by method, how well a swarm trains over home links beside data-parallel training; what is done is kept
	$(BIN)/python -m benchmarks.quality

clean:
	rm -rf $(VENV) swarm one-byte-learning *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# torch comes first and by itself: which build of it (CPU or CUDA) pip's configuration decides, and the rest follows.
$(READY): pyproject.toml constraints.txt scripts/preflight.sh
	PYTHON=$(PYTHON) bash scripts/preflight.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
