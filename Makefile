# Every target does the set-up it needs: a virtual environment in .venv, then requirements.txt
# (and the extras test and difftest of pyproject.toml), installed again only when one of those
# files changes.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
RUN := $(VENV)/.installed-run
TEST := $(VENV)/.installed-test

.DEFAULT_GOAL := help
.PHONY: help demo test slow lint format types bench report clean

help:
	@echo "make demo    slice a digits network and write the quickstart page"
	@echo "make test    every test not marked slow"
	@echo "make slow    the tests marked slow"
	@echo "make lint    formatting and lint;  make format applies both"
	@echo "make types   the type checker"
	@echo "make bench   run the benchmarks, then render BENCHMARKS.md"
	@echo "make report  render RESULTS.md and BENCHMARKS.md from experiments/results/*.json"
	@echo "make clean   remove caches and build products (.venv stays)"

$(RUN): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; say PYTHON=python3.11 after make")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -qq -r requirements.txt
	@touch $@

$(TEST): requirements.txt pyproject.toml | $(RUN)
	$(PY) -m pip install --disable-pip-version-check -qq -e '.[test,difftest]'
	@touch $@

demo: $(RUN)
	$(PY) -m experiments.quickstart

test: $(TEST)
	$(PY) -m pytest -n 2 --dist loadfile --max-worker-restart 0

slow: $(TEST)
	$(PY) -m pytest -m slow

lint: $(TEST)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

format: $(TEST)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

types: $(TEST)
	$(PY) -m mypy

bench: $(RUN)
	set -e; for file in experiments/bench_*.py; do $(PY) -m experiments.$$(basename $$file .py); done
	$(PY) -m experiments.report

report: $(RUN)
	$(PY) -m experiments.report

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
