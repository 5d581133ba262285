# Needs only make and Python; `make help` lists what there is.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CHECK_PYTHON := import sys; v = sys.version_info; v >= (3, 10) or sys.exit( \
	"Secateur needs Python 3.10 or newer, but %s is Python %d.%d: run make PYTHON=/path/to/python3.12 (and remove .venv if it is that old)." \
	% (sys.executable, v[0], v[1]))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all lint format docs clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: .venv/.installed-demo  ## prune small models and write demo-report/report.html
	$(BIN)/secateur demo --out demo-report

test: .venv/.installed-dev  ## the default test suite, with the doctests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

test-all: .venv/.installed-dev  ## every test, the slow ones too
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: .venv/.installed-dev  ## what CI asks of the source: ruff, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.installed-dev  ## formats the source in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.installed-dev  ## builds the site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## removes what make has made
	rm -rf .venv site demo-report build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis

# pip is the last thing that venv installs: without it the environment is incomplete.
$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { echo "Secateur needs Python 3.10 or newer, but there is no $(PYTHON): run make PYTHON=/path/to/python3.12."; exit 1; }
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	$(PYTHON) -m venv .venv

.venv/.installed-demo: EXTRAS := demo,hf
.venv/.installed-dev: EXTRAS := dev
NATIVE := hatch_build.py $(wildcard src/secateur/runtime/native/*)
.venv/.installed-%: pyproject.toml constraints.txt $(NATIVE) | $(BIN)/pip
	@$(BIN)/python -c '$(CHECK_PYTHON)'
	@echo "Installing secateur[$(EXTRAS)] into .venv: minutes the first time, most of it torch."
	$(PIP) install --editable '.[$(EXTRAS)]' --constraint constraints.txt
	@if [ "$(EXTRAS)" = dev ]; then $(PIP) install --no-deps --target .venv/zoo --upgrade -r benchmarks/zoo/requirements.txt; fi
	@touch $@
