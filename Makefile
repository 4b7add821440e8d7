# Sets up .venv from nothing and runs the two main jobs; `make` alone says what there is.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
# The tests simulate eight devices in each worker and the torch references are large: more workers only pay on more cores.
WORKERS ?= 2
ARGS ?=

.PHONY: help train tools test lint clean

help:
	@echo "make train [ARGS='--sft.steps=50']  set up from nothing, then train on StickMotion on one device"
	@echo "make tools [ARGS='--port=9000']     set up from nothing, then serve the tools on 127.0.0.1:8765"
	@echo "make test                           set up from nothing, then format, lint, types and all tests"
	@echo "make lint                           format, lint and types alone"
	@echo "make clean                          remove the virtual environment and all caches; data/ and runs/ stay"

train: $(VENV)/.train
	$(BIN)/python scripts/train.py --mesh=1x1 $(ARGS)

tools: $(VENV)/.train
	$(BIN)/python -m tools_server $(ARGS)

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist=loadfile --durations=15

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@for python in $${PYTHON:-} python3 python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Setting up $(VENV) with $$($$python --version)."; \
	    $$python -m venv $(VENV) && exit 0; \
	    rm -rf $(VENV); \
	    echo "error: $$python cannot make a virtual environment: install its venv module (on Debian and Ubuntu: apt install python3-venv)." >&2; \
	    exit 1; \
	  fi; \
	done; \
	echo "error: no Python 3.11 or newer was found as python3, python3.11, python3.12 or python3.13: install one, or name it with make PYTHON=/path/to/python." >&2; \
	exit 1

# The stamps save a re-installation as long as neither the dependencies nor their pins have changed.
$(VENV)/.train: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing what training and its tools need, torch among it (the first time takes several minutes and 6 GB)."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data,tools,yolo]'
	@touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing what the tests need (the first time takes several minutes and 6 GB)."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data,tools,yolo,test]'
	@touch $@ $(VENV)/.train
