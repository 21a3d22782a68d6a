# make demo     makes the environment and trains KGAT uncompressed, at 8 and at 2 bits, side by side
# make test     makes the environment and runs the gate: ruff, mypy, pytest
# make test-all the same with the slow tests
# make conformance  PyTorch's whole operator database and every PyG layer under compression; writes docs/ops.md
# make protections  takes each protection out, and shows that a test fails then
# make bench    the memory benchmark: ratio and gradient error
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
WORKERS ?= 2
export OMP_NUM_THREADS ?= 1
# what is imported is compiled then, once: all that is installed takes half a minute, and the tests start many processes
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

.PHONY: demo test test-all lint conformance protections bench clean

demo: $(READY)
	$(BIN)/python examples/demo.py

test: lint
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow and not gpu"

test-all: lint
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "not gpu"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

conformance: $(READY)
	$(BIN)/python tests/conformance/document.py --workers $(WORKERS)
	$(BIN)/python -m pytest -q -n $(WORKERS) -m slow tests/conformance/test_layers.py

protections: $(READY)
	$(BIN)/python tests/conformance/protections.py --workers $(WORKERS)

bench: $(READY)
	$(BIN)/python examples/benchmarks/memory.py

# torch first and alone: what comes after it is satisfied by it and fetches no other build
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	$(INSTALL) -e ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache dist
