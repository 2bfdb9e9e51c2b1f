# `make demo` prints a story, `make test` runs the tests; both first set up .venv with the versions of constraints.txt.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
ARGS ?=  # for pytest
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: demo test unit lint fuzz oracle slow clients examples installs clean

demo: $(VENV)/.installed
	$(BIN)/gptjax generate "Once upon a time there was" --echo --max-tokens 160 --temperature 0.6 --seed 6

test: lint unit

unit: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The fuzzers, FUZZ times as long as in `make test`; a few minutes for each 10.
FUZZ ?= 20
fuzz: $(VENV)/.installed-test
	FUZZ=$(FUZZ) $(BIN)/python -m pytest -n 2 -m fuzz $(ARGS)

# Compares with transformers, live: brings torch (CPU).
oracle: $(VENV)/.installed-oracle
	$(BIN)/python -m pytest -m oracle -n 2

# Gigabytes of disk: converting a random gpt2-xl within its memory limit. Minutes: servers under load.
slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

# The server's real clients; needs curl, and Chromium (apt install chromium). A picture of the chat page is left in build/.
clients: $(VENV)/.installed-clients
	mkdir -p build
	ARTIFACTS=build $(BIN)/python -m pytest -m clients tests/server
	for major in 1 2; do PYTHONPATH=$(VENV)/openai-$$major $(BIN)/python -m pytest -m clients tests/server/test_openai.py || exit 1; done

# Installs gptjax as a newcomer would, from a clone into fresh environments, and as its messages advise.
installs: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m installs tests/support/test_installation.py

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

# OpenAI's library is installed in its newest version, and in older ones beside.
$(VENV)/.installed-clients: $(VENV)/.installed-test
	$(PIP) -e '.[clients]'
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/openai-1 openai==1.109.1
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/openai-2 openai==2.6.1
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
