# Two commands matter: `make demo` starts the page, `make check` is what CI runs.
# Everything lives in .venv; the first time takes minutes, afterwards it is a look at a stamp.

PORT ?=
ARGS ?=
WORKERS ?= 2

# The first Python that is new enough; a virtual environment that is active counts as well.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
ENVIRONMENT = $(if $(PYTHON),,$(error QuantLab needs Python 3.11 or newer; none was found. \
	Name one with: make PYTHON=/path/to/python))@$(PYTHON) scripts/environment.py

# One thread a test process: two of them share the machine, and results stay the same everywhere.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

.PHONY: demo test lint format check docs clean help peers bench bench-quantize bench-memory bench-peers

help:
	@echo 'make demo    start the page (PORT=7861 takes that port, else the first free one from 7860)'
	@echo 'make test    every test (ARGS="-k gptq", WORKERS=$(WORKERS))'
	@echo 'make lint    formatting, lint and types'
	@echo 'make check   lint, then test: what CI runs'
	@echo 'make format  put the formatting right'
	@echo 'make peers   the environments of the peers that QuantLab is compared with (3 GB)'
	@echo 'make bench   speed beside llama.cpp, transformers and the machine (ARGS="--only gemv")'
	@echo 'make bench-quantize  seconds to quantize, against the peers (ARGS="--only gptq")'
	@echo 'make bench-peers     GPTQ and AWQ as QuantLab writes them against GPTQModel and AutoAWQ'
	@echo 'make bench-memory    peak memory of quantizing against depth (ARGS="--methods rtn")'
	@echo 'make docs    write the generated parts of README.md'
	@echo 'make clean   remove caches; .venv and results stay'

demo:
	$(ENVIRONMENT) product
	@$(BIN)/python app.py $(if $(PORT),--port $(PORT)) $(ARGS)

test:
	$(ENVIRONMENT) browser
	@$(TESTS) $(ARGS)

lint:
	$(ENVIRONMENT) development
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format:
	$(ENVIRONMENT) development
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check:
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory test

docs:
	$(ENVIRONMENT) product
	@$(BIN)/python -m quantlab.cli.docs README.md

peers:
	@$(if $(PYTHON),$(PYTHON),python3) scripts/peers.py $(ARGS)

# Ten minutes, on a machine that has nothing else to do.
bench:
	$(ENVIRONMENT) product
	@$(BIN)/python -m quantlab bench --against llama.cpp $(ARGS)

# Runs without the peers too: their rows then say how to get them.
bench-quantize:
	$(ENVIRONMENT) product
	@$(BIN)/python -m benchmarks.quantize $(ARGS)

bench-peers:
	$(ENVIRONMENT) product
	@$(BIN)/python -m benchmarks.side_by_side $(ARGS)

bench-memory:
	$(ENVIRONMENT) product
	@$(BIN)/python -m benchmarks.memory $(ARGS)

clean:
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis build
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
