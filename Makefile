# Two commands start from a bare machine with Python 3.11 and make: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo test lint unit docs clean

install: $(STAMP)

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "convette needs Python 3.11 or newer: set PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable ".[docs]" --group test
	touch $(STAMP)

demo: install
	$(BIN)/convette fit digits --budget "macs<=40%" --out runs/demo

test: lint unit

lint: install
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

# One thread a worker: two workers that each start two threads only fight over two cores.
unit: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --jaxtyping-packages=convette,beartype.beartype

docs: install
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site runs
