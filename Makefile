# make setup | demo | test | lint | bench | wheel | clean
#
# Needs Python >= 3.10 (3.11 is what the pins are tested with), a C++20 compiler and make; CMake and Ninja come with
# the build. CUDA is built when nvcc is found. Where the package index serves torch with CUDA only, name one with CPU
# wheels: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.

SHELL := /bin/bash
START := $(shell date +%s)
PYTHON ?= $(shell for p in python3.11 python3 python3.13 python3.12 python3.10; do \
	$$p -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
TORCH := torch==2.13.0
BIN := .venv/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc python triton_kernels -type f -not -name '*.pyc' 2>/dev/null)
CPP := $(shell find csrc tests/simt -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

say_time = @echo "make $@: $$(( $$(date +%s) - $(START) )) s"

.PHONY: setup demo test lint bench wheel clean

setup: .venv/dev

.venv/python:
	@test -n "$(PYTHON)" || { echo "no Python >= 3.10 with ensurepip was found; name one: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

# The developer's environment holds all that the demo needs.
.venv/dev: $(SOURCES) | .venv/python
	$(BIN)/python -m pip install -q $(TORCH) '.[dev]'
	@touch $@ .venv/demo

.venv/demo: $(SOURCES) | .venv/python
	$(BIN)/python -m pip install -q $(TORCH) '.[torch,report]'
	@touch $@

demo: .venv/demo
	$(BIN)/python examples/in_run_shapley.py --out demo-output
	$(say_time)

test: setup
	$(BIN)/python -m pytest
	$(say_time)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

bench: setup
	$(BIN)/python -m pytest benchmarks --benchmark-enable

wheel: setup
	$(BIN)/python -m pip wheel -q --no-deps -w dist .

clean:
	rm -rf .venv build dist demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
