# Everything runs in .venv, which is made on first use and follows pyproject.toml.
PYTHON ?= python3
PY := .venv/bin/python
RUNTIME := .venv/.installed-runtime
DEV := .venv/.installed-dev

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo notebooks test lint types check lock sbom audit clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(RUNTIME) ## make a phantom data set, train on it, predict a held-out scan, report (minutes, no GPU)
	.venv/bin/medseg demo

notebooks: $(DEV) ## execute the notebooks and keep their outputs (on the demo's run, which is made if there is none)
	$(PY) scripts/execute_notebooks.py

test: $(DEV) ## run the tests, one process for each core
	OMP_NUM_THREADS=1 .venv/bin/pytest -n auto --dist loadfile

lint: $(DEV) ## style, formatting and the direction of imports
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/lint-imports

types: $(DEV) ## static types
	.venv/bin/mypy

check: lint types test ## all of the above but the demo

lock: $(DEV) ## pin what the Docker image holds, by version and hash (UPGRADE=1: the newest of everything)
	$(PY) scripts/make_lock.py $(if $(UPGRADE),--upgrade)

sbom: $(DEV) ## list what the Docker image holds, as CycloneDX, in dist
	$(PY) scripts/make_sbom.py

audit: $(DEV) ## look for known vulnerabilities in what the Docker image holds
	$(PY) scripts/audit.py

clean: ## remove the environments, caches and builds; data, runs and predictions stay
	rm -rf .venv .peers build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "medseg needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is: $$($(PYTHON) --version 2>&1)" >&2; \
	  echo "name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# torch goes first and alone. Among the builds that pip can see it then picks the newest in our range, which is the
# CPU build where one is at hand ("2.13.0+cpu" ranks above "2.13.0"); resolved together with packages that pin torch,
# it could be dragged to another release and gigabytes of CUDA libraries. Without a GPU and with nothing at hand:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo
TORCH = $$($(PY) -c 'import tomllib; \
  print(*[d for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if d.startswith("torch>")])')

# pip names each package once and then hundreds of "already satisfied" and wheel lines: keep the names and the end.
# Warnings and errors come by stderr, unfiltered.
define pip_install
set -o pipefail; PYTHONUNBUFFERED=1 $(PY) -m pip install $(1) | while read -r word rest; do case "$$word" in \
  Collecting) printf ' %s' "$${rest%%[^A-Za-z0-9._-]*}" ;; \
  Installing) printf '\n  all found, installing ...\n' ;; \
  Successfully) printf '  done\n' ;; \
esac; done
endef

$(RUNTIME): pyproject.toml | $(PY)
	@echo "installing torch (some hundred MB: minutes)"
	@$(call pip_install,"$(TORCH)")
	@echo "installing medseg and what it runs with"
	@$(call pip_install,-e .)
	@touch $@

$(DEV): $(RUNTIME)
	@echo "installing what the tests and checks need"
	@$(call pip_install,-e ".[dev]")
	@touch $@
