.PHONY: help install run test test-slow test-faults test-compose lint format
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

install: $(VENV)/.installed  ## make .venv and install

run: install  ## serve the demo model on http://127.0.0.1:8000
	@exec $(BIN)/openmoe up

lint: $(VENV)/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev  ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: lint  ## lint, types, and all tests but the slow ones
	$(BIN)/pytest

test-slow: $(VENV)/.installed-dev  ## the slow tests: every switch with every number of shards, memory, waiting for NATS
	$(BIN)/pytest -m slow

test-faults: $(VENV)/.installed-dev  ## every fault: each kind of process killed, stopped, cut off, slowed down and restarted under load
	$(BIN)/pytest -m 'faults or not faults' tests/faults

test-compose: $(VENV)/.installed-dev  ## the stack of docker-compose.yml, in containers; needs a Docker engine
	$(BIN)/pytest -m compose -rs tests/compose
