# Commands of the project's own environment: the active one, else .venv.
BIN := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV)/bin/,$(if $(wildcard .venv/bin/python),.venv/bin/))
PYTHON := $(BIN)python

.DEFAULT_GOAL := help
.PHONY: help setup run test test-all lint types docs

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## make .venv with all that is needed, also for the tests
	python3 -m venv .venv
	.venv/bin/pip install -r requirements-dev.txt

run: ## the main job: a simulation, then the linear evaluation
	$(PYTHON) main.py

test: ## the tests, without those that take minutes
	$(PYTHON) -m pytest

test-all: ## all tests
	$(PYTHON) -m pytest -m ""

lint: ## style, layers, declared packages, spelling
	$(BIN)ruff check .
	$(BIN)ruff format --check .
	$(BIN)lint-imports
	$(BIN)deptry . --config .ci/deptry.toml
	$(BIN)codespell

types: ## mypy over fedssl/ and the files at the root
	$(BIN)mypy

docs: ## draw the pictures and fill the tables again
	$(PYTHON) -m scripts.draw_images
	$(PYTHON) -m benchmarks.accuracy.tables
