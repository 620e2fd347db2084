# Everything a fresh machine needs: `make demo` and `make test` create .venv, install what they use,
# build and run. PYTHON=/path/to/python uses an environment that already has torch instead.
SHELL := /bin/bash
BASE_PYTHON ?= python3
VENV := .venv
ifdef PYTHON
  PY := $(PYTHON)
else
  PY := $(VENV)/bin/python
endif
PIP = $(PY) -m pip install --disable-pip-version-check --progress-bar on -q
MODEL ?= examples/tiny/model
PROMPT ?= Once upon a time
DEMO_ARGS ?= --max-tokens 160 --temperature 0.7 --seed 5
TEST_JOBS ?= 2
TEST_ARGS ?=
GPU_JOBS ?= 8
# Long tests and short ones are told apart by the marker `full`.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_JOBS) --dist worksteal $(TEST_ARGS)
# Through the interpreter: with PYTHON=python3 nothing says in which folder the program lies.
CLANG_FORMAT = $(PY) -c 'import clang_format; clang_format.clang_format()'
CXX_FILES = $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

.DEFAULT_GOAL := help
.PHONY: help dev demo test test-full test-gpu bench bench-all report docs wheel compat lint format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# Requirement sets are installed once each; touching a requirements file installs it again. With PYTHON=...
# torch is taken as it is and only what is missing is installed.
ifdef PYTHON
STAMP := build/.stamps-$(shell echo '$(PYTHON)' | cksum | cut -d' ' -f1)
$(STAMP)/python:
	@$(PY) -c 'import torch' || { echo "PYTHON=$(PYTHON) has no torch: install torch >= 2.11 there first"; exit 1; }
	@mkdir -p $(@D) && touch $@
$(STAMP)/torch: | $(STAMP)/python
	@touch $@
else
STAMP := $(VENV)/stamps
$(STAMP)/python:
	@echo "== creating $(VENV)"
	@$(BASE_PYTHON) -m venv $(VENV)
	@mkdir -p $(@D) && touch $@
$(STAMP)/torch: requirements/torch.txt | $(STAMP)/python
	@echo "== installing requirements/torch.txt"
	@$(PIP) -r requirements/torch.txt
	@touch $@
endif
$(STAMP)/%: requirements/%.txt | $(STAMP)/torch
	@echo "== installing requirements/$*.txt"
	@$(PIP) -r requirements/$*.txt
	@touch $@

dev: $(STAMP)/torch $(STAMP)/build  ## build both libraries into python/fastinfer (FASTINFER_CUDA=auto|on|off)
	@echo "== building fastinfer (FASTINFER_CUDA=$${FASTINFER_CUDA:-auto})"
	@$(PY) setup.py -q build_ext --inplace

# An editable install once, so that `import fastinfer` works from any folder; later builds only replace the libraries.
$(STAMP)/installed: pyproject.toml | $(STAMP)/torch $(STAMP)/build $(STAMP)/runtime
	@echo "== installing fastinfer into the environment (editable)"
	@$(PIP) --no-build-isolation --no-deps -e .
	@touch $@

demo: export FASTINFER_CUDA ?= $(shell $(PY) -c 'import torch; print("auto" if torch.version.cuda else "off")' 2>/dev/null || echo off)
demo: $(STAMP)/torch $(STAMP)/build $(STAMP)/runtime  ## text from the bundled checkpoint, through fastinfer's operators
	@$(MAKE) --no-print-directory $(STAMP)/installed
	@$(MAKE) --no-print-directory dev
	$(PY) -m fastinfer generate --model $(MODEL) --prompt "$(PROMPT)" --echo $(DEMO_ARGS)

test: $(STAMP)/installed $(STAMP)/test dev  ## the test suite (at most 10 minutes on 2 cores)
	$(PYTEST) -m "not full"

test-full: $(STAMP)/installed $(STAMP)/test dev  ## the long tests too
	$(PYTEST) -m "full or not full"

# Takes the environment and the libraries as they are: the machine with the GPU may have no network.
test-gpu:  ## what needs a GPU: operators on CUDA, graphs, streams, sanitizer (GPU_JOBS=8)
	PYTHONPATH=python OMP_NUM_THREADS=2 $(PY) -m pytest -n $(GPU_JOBS) --dist worksteal tests/gpu tests/ops tests/integrations/test_aot_cpp.py tests/integrations/test_transformers_serve.py tests/test_package.py -k "cuda or gpu"

bench: $(STAMP)/installed dev  ## the benchmarks of this machine's device, as tables
	@for script in bench/bench_*.py; do echo "== $$script"; $(PY) $$script $(BENCH_ARGS) || exit 1; done

bench-all: $(STAMP)/installed dev  ## every benchmark with progress, to build/bench (small on a CPU; BENCH_ARGS="--device cuda")
	$(PY) bench/run_all.py $(BENCH_ARGS)

report: $(STAMP)/torch $(STAMP)/docs  ## docs/performance.md and its plots, from bench/results
	PYTHONPATH=python $(PY) bench/report.py

docs: $(STAMP)/installed $(STAMP)/docs dev  ## the site of docs/ in build/site; every warning is an error
	PYTHONPATH=python $(PY) -m mkdocs build --strict -q

wheel: $(STAMP)/torch $(STAMP)/build  ## dist/*.whl and dist/*.tar.gz
	$(PY) -m build --no-isolation --wheel --sdist --outdir dist .

compat: $(STAMP)/torch $(STAMP)/build  ## one wheel under the oldest and the newest torch, outside of this folder (downloads both)
	$(PY) tests/compat.py $(COMPAT_ARGS)

lint: $(STAMP)/lint  ## ruff, clang-format, mypy on the engine
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run --Werror $(CXX_FILES)
	$(PY) -m mypy
	@! grep -nE '#include *[<"](torch|ATen|c10)/' $(filter %.cu %.cuh,$(CXX_FILES)) || { echo "torch headers do not belong in device code"; exit 1; }

format: $(STAMP)/lint  ## rewrite the sources in the project's style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CXX_FILES)

clean:  ## remove what was built (not .venv)
	rm -rf build dist python/fastinfer/*.so python/*.egg-info
