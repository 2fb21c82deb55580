# Each target makes .venv when it is not there: torch, torchvision and this package, built with CUDA where nvcc is found.
#   make demo [SEED=0]   make methods [SEED=0]   make test   make bench   make lint   make docs
#   make wheel      one wheel in dist/, with the kernels of all GPU architectures where nvcc is found
#   make gpu [DEVICE=cuda] [OUT=runs/gpu]      a first session on a GPU, in ten minutes: build, tests, comparisons, figures.
#       It takes .venv where that is, else PYTHON with whatever torch it has, and asks no registry for anything.
PYTHON ?= python3
SEED ?= 0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h')

SHELL := bash
DEVICE ?= cuda
OUT ?= runs/gpu
.PHONY: demo methods test bench gpu wheel lint style types docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/selmatch demo --seed $(SEED) --out runs/demo

methods: $(VENV)/.installed
	$(BIN)/selmatch methods --seed $(SEED) --out runs/methods

# Threads that wait leave the core to other processes.
test: export OMP_WAIT_POLICY ?= passive
test: $(VENV)/.installed
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

bench: $(VENV)/.installed
	$(BIN)/python -m bench

gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m bench.gpu --device $(DEVICE) --out $(OUT)

wheel: $(VENV)/.torch  # for this Python, this torch and its CUDA; selmatch_ext/built_for.py says so beside another one
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps -w dist .

lint: style types

style: $(VENV)/.linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.cpp' -o -name '*.cu' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run -Werror

types: $(VENV)/.linters $(VENV)/.installed  # mypy reads the types of torch and of the other packages
	$(BIN)/mypy

docs: $(VENV)/.docs $(VENV)/.installed  # the pages of the API come from the package's docstrings; a warning is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html -c docs . build/docs
	@echo "build/docs/docs/index.html"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(VENV)/bin/python
	$(BIN)/python -m pip install "setuptools>=65" wheel ninja "torch>=2.11" torchvision
	touch $@

# The extension first, by itself: pip shows nothing while it compiles, and then takes what is compiled.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	@echo "Compiling the extension: some minutes on two cores. A line follows for each file."
	set -o pipefail; $(BIN)/python setup.py build_ext --inplace 2>&1 | \
	  sed -uE 's#^(\[[0-9]+/[0-9]+\]).* -c [^ ]*/csrc/([^ ]+) -o .*#\1 compiled \2#'
	$(BIN)/python -m pip install --no-build-isolation --editable ".[test]"
	touch $@

$(VENV)/.linters: Makefile | $(VENV)/bin/python
	$(BIN)/python -m pip install ruff clang-format cmake mypy types-tqdm
	touch $@

$(VENV)/.docs: Makefile | $(VENV)/bin/python  # the extra `docs` of pyproject.toml, without building the package again
	$(BIN)/python -m pip install "sphinx>=8" furo "myst-parser>=4"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info selmatch_ext/_C*.so
