# Two commands for people:   make demo   and   make test
# The others are the steps of .ci/run. Each can be called alone; a second call does not install again.
#   VENV=.venv       where the environment is made
#   PYTHON=python3   the interpreter that makes it (3.11 or newer, with the venv module)
#   PIP_ARGS=        further arguments of every pip install (an index, for example)
#   TEST_ARGS=       further arguments of pytest

VENV      ?= .venv
PIP_ARGS  ?=
TEST_ARGS ?=
PYTHON    ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
               command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && { echo $$p; break; }; done)

BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# Named in the same pip command as everything else, so that pip takes the CPU build of torch wherever it is offered one.
TORCH := 'torch>=2.11,<2.14'
SAY  := @printf '\n==> %s\n'
# Two workers with one thread each: OpenMP threads that spin beside other busy processes make a step several times slower.
QUIET_CPU := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

.DEFAULT_GOAL := help
.PHONY: help demo test gpu lint types floors docs check clean

help:
	@echo 'make demo   make $(VENV), install lmworks, run `lmworks quickstart` (first call: a few minutes)'
	@echo 'make test   make $(VENV) with the tools of developers, run every test'
	@echo 'make check  lint, types, floors and docs'
	@echo 'make gpu    the tests and benchmarks that need a GPU, below 10 minutes; GPU_PYTHON=python3: an environment that is there'

demo: $(VENV)/.lmworks
	$(SAY) 'Running lmworks quickstart: train, get killed, resume, sample, export, prove the export'
	$(BIN)/lmworks quickstart --again

test: $(VENV)/.lmworks-dev
	$(SAY) 'Running every test in two processes (the 15 slowest are listed at the end)'
	$(QUIET_CPU) $(BIN)/python -m pytest -n 2 --dist loadfile --durations=15 $(TEST_ARGS)

# An interpreter of one's own is taken as it is: GPU machines often come with theirs.
GPU_READY := $(if $(filter undefined,$(origin GPU_PYTHON)),$(VENV)/.lmworks-dev)
GPU_PYTHON ?= $(BIN)/python
gpu: $(GPU_READY)
	$(SAY) 'Running the tests that need a GPU, then both benchmarks; records go to benchmarks/evidence/'
	@worst=0; export PYTHONPATH="src$${PYTHONPATH:+:$$PYTHONPATH}"; \
	$(GPU_PYTHON) -m pytest -m gpu $(TEST_ARGS) || worst=$$?; \
	$(GPU_PYTHON) benchmarks/gpu_train.py --rounds 1 --minutes 3.5 || worst=$$?; \
	$(GPU_PYTHON) benchmarks/gpu_memory.py --minutes 3.5 --micro 8 16 32 --loss-steps 100 \
	  --arms eager recompute recompute-selective ssdtrain-host coat-optimizer coat-both || worst=$$?; \
	exit $$worst

lint: $(VENV)/.lmworks-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.lmworks-dev
	$(BIN)/mypy

floors: $(VENV)/.lmworks-dev
	$(BIN)/lint-imports
	$(BIN)/python tools/limits.py

docs: $(VENV)/.lmworks-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'The site is in site/; read it with: $(BIN)/mkdocs serve'

check: lint types floors docs

clean:
	rm -rf $(VENV) site dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/bin/python:
	$(SAY) 'Making a Python environment in $(VENV)'
	@test -n '$(PYTHON)' || { echo 'lmworks needs Python 3.11 or newer. None was found; name one: make demo PYTHON=/path/to/python3'; exit 2; }
	@$(PYTHON) -c 'import sys; print("    with Python", sys.version.split()[0], "from", sys.executable); sys.exit(sys.version_info < (3, 11))' \
	  || { echo '$(PYTHON) is older than Python 3.11; name another: make demo PYTHON=/path/to/python3'; exit 2; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo 'The venv module is missing or cannot write $(VENV). On Debian and Ubuntu: apt install python3-venv'; rm -rf $(VENV); exit 2; }

$(VENV)/.lmworks: pyproject.toml | $(VENV)/bin/python
	$(SAY) 'Installing lmworks and what it needs, PyTorch among it (about a minute and 1.7 GB where a CPU build is offered)'
	@$(PIP) $(PIP_ARGS) $(TORCH) -e .
	@$(BIN)/python -c 'import torch; print("    PyTorch", torch.__version__)'
	@touch $@

$(VENV)/.lmworks-dev: $(VENV)/.lmworks
	$(SAY) 'Installing the tools of developers (pytest, ruff, mypy, transformers for the parity tests, mkdocs)'
	@$(PIP) $(PIP_ARGS) $(TORCH) -e '.[dev]'
	@touch $@
