# PYTHON       the Python that .venv is made with, 3.11 or newer
# TORCH_INDEX  where torch comes from, as https://download.pytorch.org/whl/cpu; empty: pip's own configuration decides.
#              Read when .venv is made: `make clean` first to change it.
PYTHON ?= python3
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINNED := pyproject.toml constraints.txt

.PHONY: help demo setup test test-all lint clean

help:
	@echo "make demo      set up, fetch the demo model and run configs/quickstart.yaml"
	@echo "make test      set up and check everything: ruff, mypy, tests"
	@echo "make test-all  the same with the slow tests"
	@echo "make lint      ruff and mypy only"
	@echo "make setup     create $(VENV) for development"
	@echo "make clean     remove $(VENV)"

demo: $(VENV)/.ready-to-run
	@$(BIN)/kvshard fetch-demo
	@$(BIN)/kvshard run configs/quickstart.yaml

setup: $(VENV)/.ready-to-test

test: lint
	@$(BIN)/kvshard fetch-demo
	$(BIN)/python -m pytest

test-all: lint
	@$(BIN)/kvshard fetch-demo
	$(BIN)/python -m pytest -m ""

lint: $(VENV)/.ready-to-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(VENV)/types $(BIN)/mypy -p kvshard.kernels -p kvshard.parallel -p kvshard.runtime -p kvshard.launch

clean:
	rm -rf $(VENV)

$(VENV)/.ready-to-run: $(VENV)/.torch $(PINNED)
	$(PIP) install --constraint constraints.txt --editable '.[ray]'
	@$(BIN)/python -c $(SHOW_TORCH)
	@touch $@

# The repository root is the package, so mypy finds it through a link that has the package's name.
$(VENV)/.ready-to-test: $(VENV)/.torch $(PINNED)
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@mkdir -p $(VENV)/types && ln -sfn "$(CURDIR)" $(VENV)/types/kvshard
	@$(BIN)/python -c $(SHOW_TORCH)
	@touch $@ $(VENV)/.ready-to-run

$(VENV)/.torch: constraints.txt | $(VENV)/pyvenv.cfg
	@echo "Installing into $(VENV): this downloads torch, and takes a few minutes the first time."
	@if [ -n "$(TORCH_INDEX)" ]; then set -x; \
	  $(PIP) install --constraint constraints.txt --index-url "$(TORCH_INDEX)" torch; fi
	@touch $@

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed and $(PYTHON) is not; name one with PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "$(PYTHON) cannot create virtual environments: on Debian or Ubuntu run" \
	    "'apt install python3-venv', or name another one with PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

SHOW_TORCH := 'import torch; \
  print("torch", torch.__version__, "for", f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU", \
  "with", torch.cuda.device_count(), "GPUs here")'
