# `make demo` and `make test` need Python >= 3.10 and make; they set up an environment in .venv once.
#   make test PYTHON=python3.12 VENV=.venv312          another interpreter, another environment
#   make test CONSTRAINTS=                             let pip choose the versions
#   make test VENV_ARGS=--system-site-packages CONSTRAINTS=     use the torch that this Python already has
# pip's own variables (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...) hold here too.
PYTHON ?= python3
VENV ?= .venv
VENV_ARGS ?=
CONSTRAINTS ?= constraints.txt
JOBS ?= 2
OUTPUT ?= demo.png

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test test-gpu lint format readme clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      find the objects of the sample image and draw them into $(OUTPUT)"
	@echo "make test      the test suite"
	@echo "make test-gpu  the tests that need a CUDA device"
	@echo "make lint      style and types"
	@echo "make format    put the style right"
	@echo "make readme    write the README's tables from benchmarks/results"
	@echo "make clean     remove the environment and everything made here"

setup: $(STAMP)

# The stamp is newer than what it was made from, so nothing is installed twice.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + ": name another with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV_ARGS) $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev,hf,bench,cpu,export]'
	@touch $@

demo: $(STAMP)
	$(BIN)/visionkernels detect --sample --output $(OUTPUT)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS)

test-gpu: $(STAMP)
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "no CUDA device is visible to torch " + torch.__version__)'
	$(BIN)/python -m pytest -m gpu

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/readme_tables.py --check
	$(BIN)/python scripts/export_table.py --check

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

readme: $(STAMP)
	$(BIN)/python scripts/readme_tables.py

clean:
	rm -rf $(VENV) $(OUTPUT) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests scripts examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
