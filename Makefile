# Everything runs in .venv, made from PyPI by `make install`. `make help` lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install demo test test-faults check format bench soak kit clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: .venv/installed ## make .venv and install the project with its extras (about 6 GB with torch)

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[embedded,pacs,simulation,dev]'
	touch $@

demo: install ## the main job: a federation of five drawn hospitals, its report in runs/
	$(BIN)/consilium simulate

test: install ## all tests
	$(BIN)/pytest -n 2

test-faults: install ## every fault at several moments, hostile peers, several hosts: 45 minutes (FAULTS=sample SEED=1: some of them)
	$(BIN)/pytest -n 2 --dist loadscope -m faults --faults $(or $(FAULTS),all) --fault-seed $(or $(SEED),0) --fault-table runs/faults.md

check: install ## format, lint, types, import layers and the fast tests: before each commit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 -m "not slow and not faults"

format: install ## write the format and the lint fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: install ## figures beside plain Flower (BENCH="--dataset FILE.npz" for other data), privacy, intake of files, the wire
	$(BIN)/python -P -m simulations.compare $(BENCH)
	$(BIN)/python -P -m simulations.privacy_utility $(BENCH)
	$(BIN)/python -P -m simulations.privacy_bench
	$(BIN)/python -P -m simulations.intake_bench
	$(BIN)/python -P -m simulations.fuzz
	$(BIN)/python -P -m simulations.wire_bench
	$(BIN)/python -P -m simulations.recovery_bench

soak: install ## run after run for MINUTES (120), and whether memory, files, threads or disk grow: in runs/soak
	$(BIN)/python -P -m simulations.soak --minutes $(or $(MINUTES),120)

kit: install ## an offline installation kit in dist/, with all wheels (about 3 GB)
	deploy/make-kit.sh $(BIN)/python

clean: ## remove .venv, caches and build leftovers; runs/ stays
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
