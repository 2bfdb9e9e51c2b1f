# `make demo` prints a story, `make test` runs the tests; both first set up .venv with the versions of constraints.txt.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
ARGS ?=  # for pytest
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: demo test unit lint oracle slow examples clean

demo: $(VENV)/.installed
	$(BIN)/gptjax generate "Once upon a time there was" --echo --max-tokens 160 --temperature 0.6 --seed 6

test: lint unit

unit: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compares with transformers, live: brings torch (CPU).
oracle: $(VENV)/.installed-oracle
	$(BIN)/python -m pytest -m oracle -n 2

# Gigabytes of disk: converting a random gpt2-xl within its memory limit.
slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

examples: $(VENV)/.installed
	for script in examples/*.py; do echo "== $$script"; $(BIN)/python -W error::DeprecationWarning:gptjax $$script || exit 1; done

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "gptjax needs Python 3.11 or newer, found " + sys.version'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml $(CONSTRAINTS)
	$(PIP) -e .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/.installed-oracle: $(VENV)/.installed-test
	$(PIP) -e '.[oracle]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
