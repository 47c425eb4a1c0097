# make setup | demo | test | lint | sanitize | fuzz | bench | bench-peers | gpu | docs | wheel | wheel-matrix | clean
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
SOURCES := pyproject.toml CMakeLists.txt LICENSE $(shell find licenses csrc python triton_kernels -type f -not -name '*.pyc' 2>/dev/null)
CPP := $(shell find csrc tests examples -name "*.h" -o -name "*.c" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh" 2>/dev/null)

, := ,
say_time = @echo "make $@: $$(( $$(date +%s) - $(START) )) s"

.PHONY: setup demo test lint sanitize fuzz bench bench-peers gpu docs wheel wheel-matrix clean

setup: .venv/dev

.venv/python:
	@test -n "$(PYTHON)" || { echo "no Python >= 3.10 with ensurepip was found; name one: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

# Built once for whoever needs it, tests/test_wheel.py included.
build/wheel/built: $(SOURCES) | .venv/python
	rm -rf build/wheel
	$(BIN)/python -m pip wheel -q --no-deps -w build/wheel .
	@touch $@

# $(call install,EXTRAS,MORE): the wheel and what it needs; one of the same version would stay if it were not forced.
install = $(BIN)/python -m pip install -q $(2) "$$(echo build/wheel/*.whl)[$(1)]" && \
	$(BIN)/python -m pip install -q --no-deps --force-reinstall build/wheel/*.whl

# The developer's environment holds all that the demo and the site need.
.venv/dev: build/wheel/built
	$(call install,dev,$(TORCH))
	@touch $@ .venv/demo .venv/docs

.venv/demo: build/wheel/built
	$(call install,torch$(,)report,$(TORCH))
	@touch $@

# The site reads sources; of the package it runs the commands alone, for their page.
.venv/docs: build/wheel/built
	$(call install,docs)
	@touch $@

demo: .venv/demo
	$(BIN)/python examples/in_run_shapley.py --out demo-output
	$(say_time)

# A file of tests is one process's, because what its tests share is built once for them.
test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
	$(say_time)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

# The long forms of what `make test` does in short; see tests/core/test_sanitizers.py and tests/test_fuzz.py.
sanitize: setup
	$(BIN)/python -m pytest tests/core -m 'long or not long'
	$(say_time)

fuzz: setup
	$(BIN)/python -m pytest tests/test_fuzz.py -m long
	$(say_time)

bench: setup
	$(BIN)/python -m pytest benchmarks --ignore=benchmarks/peers --benchmark-enable --benchmark-columns=min,median

# All sizes but the largest, which takes as long as the others together: see benchmarks/README.md.
bench-peers: setup
	$(BIN)/python -m pip install -q $(TORCH) '.[peers]'
	$(BIN)/python -m pip install -q --no-deps 'backpack-for-pytorch>=1.7,<1.8'
	$(BIN)/python -m pytest benchmarks/peers --benchmark-enable --benchmark-columns=min,median -k "not (B16 and T512)"
	$(say_time)

# On a machine with a CUDA card: builds, validates, times; see benchmarks/README.md. Takes the Python that has torch, so
# that nothing is installed: make gpu GPU_PYTHON=...
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu
	$(say_time)

# Into build/site, to be opened from there; a broken link, anchor or docstring is an error.
docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	$(say_time)

# One wheel for this Python, with CUDA where nvcc is found, that names the oldest glibc it runs on; see docs/wheels.md.
WHEEL_MB := 10
wheel: setup
	rm -rf dist
	PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/auditwheel repair -w dist build/wheel/*.whl
	$(BIN)/auditwheel show dist/*.whl
	@! find dist -name '*.whl' -size +$(WHEEL_MB)M | grep . || { echo "larger than $(WHEEL_MB) MB" >&2; exit 1; }

# The wheel of this Python under several torch versions, and one of another Python without torch, by its self-check. A torch version
# without a CPU build in the index brings several GB of CUDA packages.
TORCHES := 2.13.0 2.14.1
OTHER_PYTHON := python3.12
wheel-matrix: wheel
	@for version in $(TORCHES); do \
		place=build/torch-$$version; \
		$(PYTHON) -m venv $$place && \
		$$place/bin/python -m pip install -q torch==$$version numpy pytest pytest-benchmark && \
		$$place/bin/python -m pip install -q --force-reinstall --no-deps dist/*.whl && \
		$$place/bin/python -m pytest -q tests/test_rooms.py || exit 1; \
	done
	$(OTHER_PYTHON) -m venv build/other
	rm -rf build/other/wheel
	build/other/bin/python -m pip wheel -q --no-deps -w build/other/wheel .
	build/other/bin/python -m pip install -q "$$(echo build/other/wheel/*.whl)[report]"
	build/other/bin/ghostgram doctor
	$(say_time)

clean:
	rm -rf .venv build dist demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
