# Two commands set everything up, on a machine with Python and nothing else: `make demo` and `make test`.

PYTHON ?= python3
VENV ?= .venv
# `make test TORCH=2.14.1` runs the tests with that torch, in an environment of its own; style, types and documentation
# are those of the pinned one.
ifdef TORCH
VENV := .venv-torch-$(TORCH)
CONSTRAINTS := $(VENV)/constraints.txt
else
CONSTRAINTS := constraints.txt
endif
# Tests run in so many processes, of one thread each; 1 to see them in order.
WORKERS ?= 2
# How pytest-xdist hands tests to them; `worksteal` splits files as well.
DIST ?= loadfile
# The tests that run unmeasured: to measure takes two thirds of the time again, and what these run is kernels and other
# processes, of which coverage sees little, or the same lines many times.
UNMEASURED := tests/browser tests/distributed tests/divergence tests/kernels tests/optim tests/test_memory.py \
	tests/test_followed_pages.py tests/test_readme.py tests/test_examples.py tests/test_layering.py \
	tests/callbacks/test_clipping_methods.py tests/callbacks/test_trainer_matrix.py tests/callbacks/test_who_steps.py \
	tests/callbacks/test_members.py tests/callbacks/test_monitor_quantities.py
# Branch coverage of the package by the other tests, in percent, below which `make test` fails; measured was 90.8.
FLOOR ?= 90
# By itself xdist ends with the files of one or two tests, among which are the longest; one worker then waits.
PYTEST := pytest --numprocesses $(WORKERS) --dist $(DIST) --no-loadscope-reorder
BIN := $(VENV)/bin
OLDEST := .venv-oldest
OLDEST_VERSIONS := 'torch==2.11.*' 'lightning==2.6.*' 'numba==0.60.*'
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint $(CONSTRAINTS)

.PHONY: help demo tune-demo test test-all test-oldest coverage lint docs bench clean
.DEFAULT_GOAL := help

help: ## List what can be made
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(VENV)/.demo ## Train a small language model on the standard library's sources and show what came out
	$(BIN)/lightning-optim fit --config examples/char_lm.yaml

# A smaller model and shorter runs than the demo's, so that many of them fit into minutes.
SMALL := --model.dim=64 --model.num_layers=2 --data.context=64 --data.val_windows=128

tune-demo: $(VENV)/.tune ## Compare optimizers on the demo's data, each at its own rate, and search hyperparameters; minutes
	$(BIN)/lightning-optim compare --config examples/char_lm.yaml --variants examples/compare_variants.yaml $(SMALL) \
		--seeds 3 --steps 150 --tune-lr --tune-steps 60 --out runs/compare
	$(BIN)/lightning-optim search --config examples/digits.yaml --space examples/search_space.yaml --metric val_acc \
		--trials 16 --steps 60 --validations 4 --out runs/search

test: $(VENV)/.dev $(if $(TORCH),,lint docs) ## Everything that CI runs; with `TORCH=2.14.1`, the tests alone with that torch
	rm -f .coverage .coverage.*
	$(BIN)/coverage run -m $(PYTEST) $(UNMEASURED:%=--ignore=%)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --format=total --fail-under=$(FLOOR)
	$(BIN)/python -m $(PYTEST) $(UNMEASURED)

test-all: $(VENV)/.dev lint docs ## The same, with the tests that take minutes, unmeasured
	$(BIN)/python -m $(PYTEST) -m ""

coverage: $(VENV)/.dev ## Branch coverage of all that `test` runs, file by file
	rm -f .coverage .coverage.*
	$(BIN)/coverage run -m $(PYTEST)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# Without constraints.txt, whose versions are the newest. Set PIP_EXTRA_INDEX_URL where torch for the CPU has an index
# of its own.
test-oldest: ## The default tests with the oldest torch, Lightning and numba that pyproject.toml allows
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip --disable-pip-version-check install --quiet $(OLDEST_VERSIONS) --editable '.[dev]'
	$(OLDEST)/bin/python -m $(PYTEST)

lint: $(VENV)/.dev ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.dev ## Build the documentation into site/, strictly
	$(BIN)/mkdocs build --strict

bench: $(VENV)/.dev ## Measure; minutes, on a quiet machine
	$(BIN)/python -m tests.benchmarks

clean: ## Remove the environment and everything generated
	rm -rf $(VENV) $(OLDEST) .venv-torch-*
	rm -rf .coverage .coverage.* site dist runs lightning_logs .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch first and alone: the other packages would pull in a build with CUDA.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
ifdef TORCH
	# Each torch wants a triton of its own.
	sed -e 's/^torch==.*/torch==$(TORCH)/' -e '/^triton==/d' constraints.txt > $(CONSTRAINTS)
endif
	@echo "Installing torch and the rest into $(VENV); this takes a minute or two."
	$(PIP) torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable '.[cpu,examples]'
	@touch $@

$(VENV)/.tune: $(VENV)/.demo
	$(PIP) --editable '.[cpu,examples,tune]'
	@touch $@

# timm wants torchvision, which has no build for the CPU; its optimizers do without.
$(VENV)/.dev: $(VENV)/.demo
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps timm
	@touch $@
