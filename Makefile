# One word starts each chore.
PYTHON ?= python
.DEFAULT_GOAL := help
.PHONY: help check format lint types test slow bench wheel methods docs

help:  ## print this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

check: lint types test  ## everything a change must pass: lint, types, test

format:  ## rewrite files in the one style
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .

lint:  ## style and common mistakes
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:  ## mypy --strict
	$(PYTHON) -m mypy
	$(PYTHON) -m mypy plugins

test:  ## the default tests: minutes on two cores
	$(PYTHON) -m pytest

slow:  ## long tests, and those on real volumes (CFRBENCH_DATA)
	$(PYTHON) -m pytest -n 0 -m "slow or realdata"

MEASURED ?= .benchmarks/measured.json
bench:  ## measure, and write the table of benchmarks/README.md; a missed bound fails, but is written
	status=0; $(PYTHON) -m pytest benchmarks -n 0 -m benchmark_only --benchmark-enable -s --measured $(MEASURED) || status=$$?; \
	$(PYTHON) -m benchmarks.table $(MEASURED); exit $$status

wheel:  ## build the wheel into dist/
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

methods:  ## write docs/methods.md from the method cards
	$(PYTHON) -c "from cfrbench.cli import main; main()" ssl show --all --markdown > docs/methods.md

docs:  ## build the pages into site/
	$(PYTHON) -m mkdocs build --strict
