# Two commands for a newcomer: `make demo` and `make test`; both make .venv on their first run.
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

# One worker a core, one thread a worker: tiny models gain nothing from threads.
PARALLEL ?= -n auto --dist loadfile

# Nothing is fetched from a model hub, by the tests or by the demo.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-gpu survey decoders soak library kills bench reference lint format clean

help:
	@echo "make demo      adapt, train, fold and export a real pretrained model (all-MiniLM-L6-v2)"
	@echo "make test      the fast tests"
	@echo "make test-all  every test, the slow ones too"
	@echo "make test-gpu  the tests that need CUDA, where there is a GPU"
	@echo "make library   measure every rule anew, for the table of peftc rules"
	@echo "make bench     the measurements"
	@echo "make soak      train, save, kill -9 and resume for 30 minutes: nothing lost or corrupt"
	@echo "make kills     kill -9 merge, export and unmerge 200 times: whole or absent every time"
	@echo "make survey    every model type of transformers, for hours"
	@echo "make decoders  every decoder of transformers: cached steps, padding, attention, causality, greedy text"
	@echo "make reference rules/REFERENCE.md and the tables in rules/README.md, from peftc's own tables"
	@echo "make lint      ruff and pyright"
	@echo "make clean     remove .venv and everything built"
	@echo "PYTHON=python3.12 make ... chooses the Python that .venv is made with"

install: $(STAMP)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: a later requirement that 2.13.0 satisfies then leaves the installed build alone.
$(STAMP): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch==2.13.0
	$(PIP) -e ".[test,train,demo]"
	@touch $@

$(DEV_STAMP): $(STAMP)
	$(PIP) -e ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not slow and not bench and not survey and not gpu"

test-all: $(STAMP)
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not bench and not survey and not gpu"

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -q -m gpu -rs

library: $(STAMP)
	$(BIN)/python tests/measure.py

bench: $(STAMP)
	$(BIN)/python -m pytest -q -m bench -s

# Every model type of transformers: hours on two cores. `python tests/survey.py` writes the table of peftc families.
survey: $(STAMP)
	$(BIN)/python -m pytest -q -m survey -s

# `make soak MINUTES=5` is shorter; --seed in tests/soak.py draws other moments to kill.
MINUTES ?= 30
soak: $(STAMP)
	$(BIN)/python -W ignore tests/soak.py $(MINUTES)

# `make kills KILLS=20` is shorter.
KILLS ?= 200
kills: $(STAMP)
	$(BIN)/python -W ignore tests/kill_merge.py $(KILLS)

# What is in the table already stays; `python tests/decoders.py --show` prints the misses and the totals.
decoders: $(STAMP)
	$(BIN)/python tests/decoders.py

reference: $(STAMP)
	$(BIN)/python -m peftc.reference.pages rules

# pyright knows nothing of setuptools' package-dir, so passes/ and rules/ are linked to where they install.
lint: $(DEV_STAMP)
	@mkdir -p build/typing/peftc && touch build/typing/peftc/__init__.py
	@ln -sfn ../../../passes build/typing/peftc/passes
	@ln -sfn ../../../rules build/typing/peftc/rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info peftc-out merged demo-out .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
