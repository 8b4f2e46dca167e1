# `make demo` and `make test` need Python >= 3.10, git and make; they set up .venv themselves, once.
#
# Variables: PYTHON (interpreter of the environment), VENV (its folder), TORCH (what pip installs
# as torch), JOBS (test processes), PYTEST_ARGS.

PYTHON ?= python3
VENV ?= .venv
# Where there is no NVIDIA GPU, an exact pin takes the CPU build on indexes that offer one. PyPI's
# own Linux wheel carries CUDA and also runs on a CPU; for a smaller download add the index of CPU
# builds named in PyTorch's install guide: make demo TORCH="torch==2.13.0 --index-url <that index>"
TORCH ?= $(shell if command -v nvidia-smi >/dev/null 2>&1; then echo 'torch>=2.11'; else echo 'torch==2.13.0'; fi)
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -gt 8 ] && n=8; echo $$n)
PYTEST_ARGS ?=

BIN := $(VENV)/bin
TORCH_STAMP := $(VENV)/.torch-installed
STAMP := $(VENV)/.hf-vq-installed

.DEFAULT_GOAL := help
.PHONY: help torch setup demo test lint types ci clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

setup: $(STAMP) ## make the environment (.venv) that all other commands use

torch: $(TORCH_STAMP) ## make an environment with torch alone, the first half of setup

$(TORCH_STAMP):
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("hf_vq needs Python >= 3.10, $(PYTHON) is " + sys.version.split()[0] + "; try make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@touch $@

$(STAMP): pyproject.toml $(TORCH_STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(STAMP) ## quantize the bundled model, reload it in a new process, compare, generate
	$(BIN)/python examples/demo.py

test: $(STAMP) ## run all tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

lint: $(STAMP) ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## check types
	$(BIN)/mypy

ci: ## everything .ci/run checks, in environments of its own
	.ci/run

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist demo-output *.egg-info autoload/build autoload/dist autoload/*.egg-info
