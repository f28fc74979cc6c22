# make demo and make test work from nothing: they make .venv and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: demo test slow faults lint fix bench clean

demo: $(VENV)/.demo
	$(BIN)/embedpipe demo $(ARGS)

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 $(ARGS)

slow: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m slow --timeout 3600 $(ARGS)

# Kills, refused system calls, power cuts, full disks: all of them. Takes about 20 minutes; strace and root for some.
faults: $(VENV)/.dev
	OMP_NUM_THREADS=1 EMBEDPIPE_FAULTS=full $(BIN)/pytest -n 2 tests/faults --timeout 3600 $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/second_extract.py $(ARGS)

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable '.[demo]'
	$(BIN)/python -c "import torchvision"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP_INSTALL) --editable '.[demo,test,lint]'
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis embedpipe-demo
