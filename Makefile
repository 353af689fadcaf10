# Everything a newcomer, a developer or CI types. `make demo` and `make test` need Python 3.11, pip and nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# One torch thread per process: small matrices are slower on a spinning thread pool, and a shared core makes it far worse.
RUN    := OMP_NUM_THREADS=1

.PHONY: install demo test check bench docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: install
	$(BIN)/miles train --profile quickstart

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(RUN) $(BIN)/python -m pytest -n 2 -m "not slow and not gpu" tests/cpu

test: check
	$(RUN) $(BIN)/python -m pytest -n 2 -m "slow and not gpu" tests

bench: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	for b in benchmarks/*.py; do $(RUN) $(BIN)/python $$b || exit 1; done

docs: install
	$(BIN)/python -m miles_cli.docs

clean:
	rm -rf $(VENV) build dist
