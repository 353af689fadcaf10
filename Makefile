# Everything a newcomer, a developer or CI types. `make demo` and `make test` need Python 3.11, pip and nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SGLANG := .venv-sglang
SGLANG_STAMP := $(SGLANG)/.installed
# One torch thread per process: small matrices are slower on a spinning thread pool, and a shared core makes it far worse.
# Bytecode is kept, as an installed package keeps it: tests start `miles` hundreds of times.
RUN    := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=

.PHONY: install demo test test-scale sglang-cpu check bench docs clean

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
	MYPYPATH=benchmarks $(BIN)/mypy --explicit-package-bases benchmarks/*.py
	$(BIN)/lint-imports
	$(RUN) $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu and not scale" tests/cpu

test: check
	$(RUN) $(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not gpu and not scale" tests

# SGLang pins its own torch, so its server has an environment of its own. Its argument table is read from it.
sglang-cpu: $(SGLANG_STAMP)

$(SGLANG_STAMP): docker/sglang-cpu.txt docker/sglang-cpu-constraints.txt
	$(PYTHON) -m venv $(SGLANG)
	$(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check -c docker/sglang-cpu-constraints.txt -r docker/sglang-cpu.txt
	$(SGLANG)/bin/python -m pip install --quiet --disable-pip-version-check -c docker/sglang-cpu-constraints.txt --no-deps torchvision sglang
	$(SGLANG)/bin/python miles/rollout/sglang/scripts/dump_args.py > $(SGLANG)/sglang_args.json
	cp $(SGLANG)/sglang_args.json miles/config/sglang_args.json
	touch $@

# The scale path on real parts: SGLang servers, without a GPU.
test-scale: install sglang-cpu
	$(RUN) $(BIN)/python -m pytest -m scale tests

bench: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	for b in benchmarks/*.py; do $(RUN) $(BIN)/python $$b || exit 1; done

docs: install
	$(BIN)/python -m miles_cli.docs

clean:
	rm -rf $(VENV) $(SGLANG) build dist
