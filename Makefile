# Everything a fresh machine needs: `make demo` and `make test` create .venv, install what they use, build and run.
# PYTHON=/path/to/python uses an environment that already has torch instead of creating .venv.
SHELL := /bin/bash
BASE_PYTHON ?= python3
VENV := .venv
ifdef PYTHON
  PY := $(PYTHON)
  STAMPS :=
else
  PY := $(VENV)/bin/python
endif
BIN = $(dir $(PY))
PIP := $(PY) -m pip install --progress-bar on --disable-pip-version-check -q
MODEL ?= examples/tiny/model
PROMPT ?= Once upon a time, Anna
TEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv deps-build deps-run deps-test deps-lint dev build demo test test-full bench wheel lint format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

ifndef PYTHON
$(VENV)/bin/python:
	$(BASE_PYTHON) -m venv $(VENV)
define install_once
$(VENV)/.$(1): requirements/$(1).txt | $(VENV)/bin/python
	@echo "== installing requirements/$(1).txt"
	$(PIP) -r requirements/$(1).txt
	@touch $$@
endef
$(foreach set,torch build runtime test lint,$(eval $(call install_once,$(set))))
need = $(foreach set,$(1),$(VENV)/.$(set))
else
need =
endif

dev: $(call need,torch build)  ## build the libraries in place (python/fastinfer/*.so); FASTINFER_CUDA=auto|on|off
	@echo "== building fastinfer in place"
	$(PY) setup.py -q build_ext --inplace
