# make demo: install and run the main job. make test: install and run all tests. make lint: ruff and mypy.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint help

help:
	@head -1 Makefile

.venv/installed: pyproject.toml pathconvert/version.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

demo: .venv/installed
	$(BIN)/pathconvert demo

test: .venv/installed lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/mypy
