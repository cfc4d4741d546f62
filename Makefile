# `make demo` and `make test` set up everything they need in .venv; the only requirement is Python 3.11 or newer.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DEMO   ?= demo-out
# With an NVIDIA GPU take torch's CUDA build, without one the pinned CPU build.
GPU    := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(if $(GPU),,--constraint constraints-cpu.txt)
PIPLOG := 2>$(VENV)/pip-messages.txt || { cat $(VENV)/pip-messages.txt; exit 1; }

.PHONY: help install demo test lint types unit format clean

help:
	@echo "make demo   set up .venv and run the whole pipeline on real photographs (4 minutes, report in $(DEMO)/report.html)"
	@echo "make test   set up .venv and run lint, types and tests"
	@echo "make format rewrite the sources in the project's style"
	@echo "make clean  remove .venv and the demo's output"

$(VENV)/.ready: pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, found " + sys.version.split()[0] + "; set PYTHON=python3.11")'
	@echo "setting up $(VENV) (about two minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) --editable . $(PIPLOG)
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	@$(PIP) --editable '.[test]' $(PIPLOG)
	@touch $@

install: $(VENV)/.ready

demo: $(VENV)/.ready
	$(BIN)/dinov2 demo --out $(DEMO)

test: lint types unit

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready-test
	$(BIN)/mypy

# Two worker processes with one thread each, or the threads of both fight over the cores.
unit: $(VENV)/.ready-test
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile

format: $(VENV)/.ready-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(DEMO)
