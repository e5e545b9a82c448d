# `make` lists the targets. Each sets up what it needs: a virtual environment in .venv, pinned.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo test test-slow test-gpu check lint types bench clean

help:
	@echo "make demo       the whole way on the icons, ends with a table and a report"
	@echo "make test       the tests"
	@echo "make check      lint, types, tests"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-gpu   the tests that need a CUDA device"
	@echo "make bench      performance gates, as ratios"
	@echo "make clean      remove the virtual environment and caches, keep runs/"

$(READY): constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(READY)
	$(BIN)/dafm demo

test: $(READY)
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY)
	$(BIN)/pytest -m slow --timeout 1800

test-gpu: $(READY)
	$(BIN)/pytest -m gpu --timeout 1800

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

check: lint types test

bench: $(READY)
	$(BIN)/python -m benchmarks

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
