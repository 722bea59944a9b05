# The commands of a checkout: `make` lists them. They need Python 3.11 or newer with pip, and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXAMPLES := watch_tasks.examples.github_events watch_tasks.examples.feed

# Says that the environment is complete; older than what it was made from, it is made anew.
READY := $(VENV)/ready

# Where it is set, each of the many processes that tests start compiles the package anew: a quarter of their start.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help up test lint format chaos bench docker constraints clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

up: $(READY) ## start broker, worker and Flower, and feed them invented events; Ctrl-C ends it all
	@$(BIN)/watch-tasks up $(EXAMPLES) & up=$$!; \
	$(BIN)/python -m watch_tasks.examples.feed --wait 60 & feed=$$!; \
	trap 'trap "" INT TERM HUP; kill $$feed $$up 2>/dev/null; wait; exit 130' INT TERM HUP; \
	wait $$up; code=$$?; kill $$feed 2>/dev/null; wait; exit $$code

# Four processes pay on two cores: about half of what tests of workers take is waiting. Each process starts servers of
# its own; whole files go to one, so that what a file shares is made once, in the order that tests/conftest.py gives.
test: $(READY) ## run the tests
	$(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder

lint: $(READY) ## check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(READY) ## put the code into its form
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

chaos: $(READY) ## run the long tests: workers and servers are killed under load
	$(BIN)/python -m pytest -m chaos --timeout 1800

bench: $(READY) ## measure beside other libraries, on servers of its own, and write docs/benchmarks.md: an hour
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks

docker: $(READY) ## run the tests in containers: the image, compose.yaml, Redis and RabbitMQ
	$(BIN)/python -m pytest -m docker tests/docker

constraints: ## renew constraints.txt: the newest versions that fit together
	$(MAKE) clean
	grep '^#' constraints.txt > constraints.new && mv constraints.new constraints.txt
	$(MAKE) $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all,dev,bench]'
	$(BIN)/python -m pip freeze --exclude-editable | grep '==' >> constraints.txt
	touch $(READY)

clean: ## remove the environment and everything that was generated
	rm -rf $(VENV) .watch .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

# Debian's Python makes no environment with pip in it: there its own pip fills one that has none.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "watch-tasks needs Python 3.11 or newer, and $(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	rm -rf $(VENV)
	@if $(PYTHON) -m venv $(VENV) > /dev/null 2>&1; then \
	  pip="$(BIN)/python -m pip"; \
	else \
	  $(PYTHON) -m venv --clear --without-pip $(VENV) && pip="$(PYTHON) -m pip --python $(BIN)/python"; \
	fi && set -x && $$pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@
