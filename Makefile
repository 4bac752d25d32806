# The two commands of the README are `make demo` and `make test`. A bare machine needs make and Python >= 3.10 with venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
DEMO_OUTPUT ?= results/demo
# Seconds of training for each of the five methods.
DEMO_SECONDS ?= 20
# The demo's matrices are so small that more threads cost more than they bring, above all on a busy machine.
DEMO_THREADS ?= 1
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test lint benchmark docs clean

help:
	@echo "make demo       install into $(VENV), compare five methods on real data (about two minutes)"
	@echo "make test       install into $(VENV), run the linter, the type checker and the tests"
	@echo "make lint       the linter and the type checker alone"
	@echo "make benchmark  speed and memory beside other libraries"
	@echo "make docs       API reference as HTML in build/docs"
	@echo "make clean      remove $(VENV), caches and build output; results/ stays"

demo: $(VENV)/.installed-experiments
	$(BIN)/curvlib compare --seconds $(DEMO_SECONDS) --threads $(DEMO_THREADS) --output $(DEMO_OUTPUT) --overwrite
	@echo "The picture is $(DEMO_OUTPUT)/comparison.png."

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread a worker: workers that share cores otherwise slow each other down.
test: lint
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

benchmark: $(VENV)/.installed-test
	$(BIN)/python -m benchmarks

docs: $(VENV)/.installed-docs
	$(BIN)/pdoc --docformat google --math --output-directory build/docs curvlib

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp for each extra: nothing is installed again until the requirements change.
$(VENV)/.installed-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("curvlib needs Python >= 3.10; set PYTHON=...") if sys.version_info < (3, 10) else 0'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[$*]'
	@touch $@
