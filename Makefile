# make demo, make test: each makes .venv by itself. Nothing but Python 3.11+ and make is needed.
PYTHON ?= python3
# PyTorch's own index of CPU builds; name another where that one cannot be reached.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BIN := .venv/bin
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

.PHONY: help demo quick accelerator-report test check static lint types pytest format clean

help:
	@echo "make demo    train a small memory and show what it gained (at most ten minutes, sized to the machine)"
	@echo "make quick   lint and the tests that are not slow: less than two minutes"
	@echo "make accelerator-report   GPU tests, benchmarks and medquad in pieces of under 8 minutes"
	@echo "make test    what CI runs: ruff, import-linter, pyright, pytest"
	@echo "make format  format the code"
	@echo "make clean   remove .venv and caches"

demo: .venv/ready
	$(BIN)/memlm demo

accelerator-report: .venv/ready
	PYTHONPATH=src $(BIN)/python -m benchmarks.accelerator

quick: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not assets and not table"

test: .venv/ready
	+$(MAKE) --no-print-directory -j2 static pytest
check: test

static:  # one after the other, beside the tests
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory types

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache

types: .venv/ready
	$(BIN)/pyright --pythonpath $(BIN)/python

pytest: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "memlm needs Python 3.11 or newer; name one with PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@if $(BIN)/python -c "import torch" 2>/dev/null; then :; \
	elif command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then \
		echo "GPU found: installing $(TORCH)"; $(BIN)/pip install --quiet "$(TORCH)"; \
	else \
		echo "no GPU found: installing the CPU build of $(TORCH)"; \
		$(BIN)/pip install --quiet --retries 0 --timeout 20 --index-url "$(TORCH_INDEX)" "$(TORCH)" 2>/dev/null \
		|| { echo "$(TORCH_INDEX) cannot be reached: installing what pip finds"; $(BIN)/pip install --quiet "$(TORCH)"; }; \
	fi
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch .venv/ready

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
