# Each target makes its own virtual environment when there is none.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
TORCH ?= 2.15.0
OTHER = .venv-torch-$(TORCH)

.PHONY: demo test test-files test-docstrings test-all test-kernels test-gpu test-stack test-torch mutate check docs docs-serve figures parity bench clean

demo: $(READY)  ## train a small network on handwritten digits with four optimizers, each at its best learning rate of five
	$(BIN)/descend compare digits --tune --seeds 3 --steps 120

test: test-files test-docstrings  ## tests and doctests

test-files: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

test-docstrings: $(READY)
	$(BIN)/python -m pytest --doctest-modules --pyargs descend

test-all: $(READY)  ## also every combination of dtypes
	$(BIN)/python -m pytest -m ''

test-kernels: $(READY)  ## compile every rule for GPUs, in many mixes of dtypes, and look at the result; needs no GPU
	$(BIN)/python -m pytest -m slow --numprocesses auto --dist worksteal tests/backends/triton

test-gpu: $(READY)  ## the tests that need a GPU; skipped where torch sees none
	$(BIN)/python -m pytest -m gpu

test-stack: $(READY)  ## with Lightning, Accelerate, transformers and BoTorch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[stack]'
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --ignore tests/stack/contract tests/stack

test-torch: $(OTHER)/ready  ## tests and doctests against another torch: make test-torch TORCH=2.15.0
	$(OTHER)/bin/python -m pytest
	$(OTHER)/bin/python -m pytest --doctest-modules --pyargs descend

mutate: $(READY)  ## how many wrong versions of rules, clipping and checkpoints the tests notice
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[mutate]'
	rm -rf mutants
	OMP_NUM_THREADS=1 DESCEND_TEST_BACKEND=eager $(BIN)/mutmut run
	$(BIN)/mutmut results
	$(BIN)/python tests/mutation_rate.py

check: $(READY)  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

parity: $(READY)  ## write the page about the installed torch in docs/parity
	$(BIN)/python tests/parity/parity_table.py

docs: $(READY)  ## build the site into build/site; a warning is an error
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(READY)  ## show the site, and follow what changes
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve --watch src --watch examples

figures: $(READY)  ## compute the figures and numbers of docs/learn, five minutes; close everything else first
	$(BIN)/python examples/learn_adam.py
	$(BIN)/python examples/learn_weight_decay.py
	$(BIN)/python examples/learn_second_order.py
	$(BIN)/python examples/learn_clipping.py
	$(BIN)/python examples/learn_sparse.py

bench: $(READY)  ## speed against torch.optim and others, about fifty minutes; evaluations against SciPy, about twenty
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/matrix.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/sparse.py
	$(BIN)/python benchmarks/in_backward.py
	$(BIN)/python benchmarks/monitor.py
	$(BIN)/python benchmarks/distributed.py
	$(BIN)/python benchmarks/minimize.py
	$(BIN)/python benchmarks/least_squares.py
	$(BIN)/python benchmarks/pinn.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

$(OTHER)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OTHER)
	sed '/^torch==/d' constraints.txt > $(OTHER)/constraints.txt
	$(OTHER)/bin/python -m pip install --quiet --constraint $(OTHER)/constraints.txt --editable '.[test]' torch==$(TORCH)
	touch $@

clean:
	rm -rf .venv .venv-torch-* build dist runs mutants
