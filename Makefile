# `make demo` and `make test` set up everything they need in .venv, and bring it up to date when
# the requirements change. Nothing outside of this folder is written.
#
#   PYTHON=python3.12        the interpreter to build .venv with (3.11 to 3.13)
#   PIP_OPTIONS="..."        more options for pip, for instance an index of CPU builds of PyTorch,
#                            which on Linux without a GPU saves the download of CUDA

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	if $$p -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	2>/dev/null; then echo $$p; break; fi; done)
PIP_OPTIONS ?=
PYTEST_OPTIONS ?= -n 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.up-to-date
PLUGIN := $(wildcard tests/plugin/pyproject.toml)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_OPTIONS) -c constraints.txt

.PHONY: help setup demo test check format bench docs clean

help: ## Show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## Make or update the virtual environment

$(STAMP): pyproject.toml constraints.txt Makefile $(PLUGIN)
	@if [ -z "$(PYTHON)" ]; then echo "lamella needs Python 3.11, 3.12 or 3.13 with venv; set PYTHON=" >&2; exit 1; fi
	if [ ! -x $(BIN)/python ]; then echo "making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); fi
	echo "installing the requirements into $(VENV)"
	$(PIP) hatchling editables setuptools wheel
	# torch alone first: the pinned one comes, not the newest that some requirement would take.
	$(PIP) torch
	$(PIP) --no-build-isolation -e ".[cpu,demo,dev,docs]"
	if [ -n "$(PLUGIN)" ]; then $(PIP) --no-deps --no-build-isolation -e tests/plugin; fi
	touch $@

demo: $(STAMP) ## Compile a real pretrained model and show what it gained
	@$(BIN)/python -m benchmarks.demo

test: $(STAMP) ## Run all tests
	@$(BIN)/python -m pytest $(PYTEST_OPTIONS)

check: $(STAMP) ## Formatting, lints, types, import layers
	@$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest -q tests/meta/test_layers.py

format: $(STAMP) ## Format, and mend what the linter can mend
	@$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(STAMP) ## Run the benchmarks; writes benchmarks/results/*.json and the table of the README
	@$(BIN)/python -m benchmarks

docs: $(STAMP) ## Build the documentation into site/
	@$(BIN)/mkdocs build --strict

clean: ## Remove what was built
	@rm -rf $(VENV) site dist build .pytest_cache .ruff_cache .hypothesis
