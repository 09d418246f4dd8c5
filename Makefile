# Every chore has one name; continuous integration uses the same names.
PYTHON ?= python3
BIN := .venv/bin
# One thread per process: two cores and several processes otherwise wait for each other at every barrier.
export OMP_NUM_THREADS ?= 1
ALL_CORES := env -u OMP_NUM_THREADS
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-clients soak check format lock render serve bench evaluate sheet miniature ablation

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 12

.venv/.done: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep -oE '^uv==[0-9.]+' requirements.lock)"
	# Compiled once here, or every replica would compile PyTorch for itself at its first start.
	$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	touch $@

setup: .venv/.done  ## a virtual environment in .venv with exactly what requirements.lock names

demo: setup  ## a drawn person in a scene of their own, and the faces of real photos, through Ray Serve on this machine
	$(BIN)/pulid demo

test: setup  ## all tests but those of the next line (about 15 minutes on 2 cores)
	$(BIN)/python -m pytest -m "not clients"

test-clients: setup  ## the Studio in a real Chromium (installs Debian's package where there is none)
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }
	$(BIN)/python -m pytest -m clients tests/clients

soak: setup  ## 2,000 jobs of 32 clients, with cancels and killed replicas (about 15 minutes)
	$(BIN)/python -m bench.soak

test-fast: setup  ## the tests that need no Ray cluster
	$(BIN)/python -m pytest -m "not cluster and not clients"

check: setup  ## ruff, formatting, mypy --strict on pipeline and deployments
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## formatting and the lint fixes that are safe
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: setup  ## requirements.lock anew from pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --group dev \
		--no-emit-index-url --no-emit-find-links pyproject.toml --output-file requirements.lock

render: setup  ## serve_config.yaml into the KubeRay manifest
	$(BIN)/python -m cluster.render

serve: setup  ## the service on http://127.0.0.1:8000 (preset miniature, pictures in ./pictures)
	$(BIN)/pulid serve

bench: setup  ## all benchmarks: bench/results.json, the table and the plots of docs/benchmarks.md
	$(BIN)/python -m bench --write-docs

evaluate: setup  ## likeness, adherence and colours over 60 people that nothing was trained on (minutes)
	$(ALL_CORES) $(BIN)/pulid evaluate --json evaluation.json

sheet: setup  ## the pictures of the README: docs/images/sheet.png, mixed.png, together.png, tradeoff.png
	$(ALL_CORES) $(BIN)/python -m cluster.sheet docs/images

miniature: setup  ## the miniature's weights from nothing (about 3 hours on 2 cores; goes on where it was stopped)
	$(BIN)/python -m cluster.miniature build

ablation: setup  ## the paper's ablation on what `make miniature` left: flow loss, + ID loss, + alignment
	$(BIN)/python -m cluster.ablation
