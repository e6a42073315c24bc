# moe_efa: `make bench` and `make test` work on a fresh Debian or Ubuntu; everything else is read from setup.py.
# PYTHON, TORCH and BENCH_ARGS / PYTEST_ARGS may be set on the command line.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.9.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
SOURCES := $(shell find csrc -type d -o -name '*.cc' -o -name '*.cu' -o -name '*.h' -o -name '*.map')

# The CUDA library takes minutes: here it is built for a GPU only (tests build one of their own). Set it to decide.
export MOE_EFA_CUDA ?= $(if $(wildcard /dev/nvidia0),,0)

# A CUDA build of torch brings its own Triton; a CPU build brings none.
TORCH_SUITS := import importlib.metadata as m; exit(tuple(map(int, m.version("torch").split(".")[:2])) < (2, 7))
TORCH_IS_CPU := import torch; exit(torch.version.cuda is not None)

.PHONY: help system build bench test lint format clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/:/' | column -t -s:

build: .venv/.extension ## .venv with the package (editable), its tools and the native extension

bench: .venv/.extension ## dispatch and combine between 4 ranks on this host, as 2 nodes
	$(BIN)/python bench/bench_dispatch_combine.py --ranks 4 --node-size 2 $(BENCH_ARGS)

test: lint ## lint, then every test that applies to this machine
	@# A selection of one's own may leave a part without tests (status 5); the whole never does.
	@part() { echo "pytest $$*"; $(BIN)/pytest tests "$$@" $(PYTEST_ARGS) || [[ $$? == 5 && -n "$(strip $(PYTEST_ARGS))" ]]; }; \
	part -m "not waits and not alone" --numprocesses 3 --dist loadfile; \
	part -m waits --numprocesses 4; \
	part -m alone

lint: .venv/.extension ## ruff, mypy, codespell, clang-format (.pre-commit-config.yaml)
	$(BIN)/pre-commit run --all-files --show-diff-on-failure

format: .venv/.extension ## rewrites the sources as lint wants them
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	find csrc tests/csrc -name '*.cc' -o -name '*.cu' -o -name '*.h' | xargs $(BIN)/clang-format -i

clean: ## removes what was built, not .venv
	rm -rf build dist *.egg-info moe_efa/_C*.so moe_efa/libmoe_efa_cuda.so .venv/.extension .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# Packages of the system: installed only where something is missing, and only with the rights to do so.
system:
	@missing=""; \
	has_header() { echo "#include <$$1>" | g++ -E -x c++ -I/opt/amazon/efa/include - >/dev/null 2>&1; }; \
	command -v git >/dev/null || missing+=" git"; \
	command -v g++ >/dev/null || missing+=" g++"; \
	has_header rdma/fabric.h || missing+=" libfabric-dev"; \
	has_header doctest/doctest.h || missing+=" doctest-dev"; \
	if [[ " $(MAKECMDGOALS) " == *" test "* && $$(uname -m) == x86_64 ]]; then \
	  command -v aarch64-linux-gnu-g++ >/dev/null || missing+=" g++-aarch64-linux-gnu"; \
	  command -v qemu-aarch64 >/dev/null || missing+=" qemu-user"; \
	fi; \
	if ! command -v $(PYTHON) >/dev/null; then \
	  missing+=" python3 python3-venv python3-dev"; \
	else \
	  debian=$$($(PYTHON) -c 'import sys; print("python%d.%d" % sys.version_info[:2] * (sys.base_prefix == "/usr"))'); \
	  $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing+=" $${debian:-python3}-venv"; \
	  headers=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))'); \
	  if [[ ! -e $$headers/Python.h ]]; then \
	    [[ -n $$debian ]] || { echo "error: $(PYTHON) has no C headers ($$headers/Python.h)" >&2; exit 1; }; \
	    missing+=" $$debian-dev"; \
	  fi; \
	fi; \
	[[ -n $$missing ]] || exit 0; \
	sudo=""; \
	if ! command -v apt-get >/dev/null; then \
	  echo "error: missing here, by their Debian names:$$missing" >&2; exit 1; \
	elif [[ $$(id -u) != 0 ]]; then \
	  if command -v sudo >/dev/null && { sudo -n true 2>/dev/null || [[ -t 0 ]]; }; then sudo=sudo; else \
	    echo "error: missing packages; as root, run: apt-get install -y$$missing" >&2; exit 1; \
	  fi; \
	fi; \
	echo "installing$$missing"; \
	$$sudo apt-get update -qq; \
	$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null

.venv/.dependencies: setup.py pyproject.toml moe_efa/_version.py | system
	@if ! $(BIN)/python -c '' 2>/dev/null; then \
	  inherit=""; \
	  if $(PYTHON) -c '$(TORCH_SUITS)' 2>/dev/null; then inherit=--system-site-packages; fi; \
	  echo "creating .venv $$inherit"; \
	  $(PYTHON) -m venv --clear $$inherit .venv; \
	fi
	@$(BIN)/python -c '$(TORCH_SUITS)' 2>/dev/null || { echo "installing $(TORCH)"; $(PIP) "$(TORCH)"; }
	@echo "installing moe_efa (editable) and its tools"; \
	triton=""; if $(BIN)/python -W ignore -c '$(TORCH_IS_CPU)'; then triton="$(TRITON)"; fi; \
	$(PIP) --editable '.[dev]' $$triton
	@touch $@

.venv/.extension: .venv/.dependencies $(SOURCES)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@
