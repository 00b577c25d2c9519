# Everything here works from a fresh checkout with Python >= 3.10 and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench offline-model clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 8

demo: $(VENV)/.installed-cli  ## install, then run the offline demonstration
	$(BIN)/delta-mem demo

test: $(VENV)/.installed-dev  ## install, then run the tests
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(VENV)/.installed-dev  ## install, then check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.installed-dev  ## install, then measure what the memory costs on this machine
	$(BIN)/delta-mem bench --output bench.json

offline-model: $(VENV)/.installed-dev  ## install, then train the small offline model anew, into build/offline
	$(BIN)/python recipes/offline_model.py --output build/offline

clean:  ## remove build outputs and caches; keeps .venv
	rm -rf build dist .pytest_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The dev extra contains the cli extra, so that installing dev serves both.
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]"
	@touch $(VENV)/.installed-cli $@

$(VENV)/.installed-cli: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install -c constraints.txt -e ".[cli,cpu]"
	@touch $@

# pip, not python: where ensurepip is missing, venv fails and leaves a python without pip behind.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "delta-mem needs Python >= 3.10, which '$(PYTHON)' is not; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
